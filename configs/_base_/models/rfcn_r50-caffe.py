# R-FCN of the authors of deformable convolution: c5 with a dilation of 2 and the stride of c4,
# reduced to 1024 channels; the RPN reads c4. The sampler keeps all RoIs: hard examples are mined.
_base_ = "mmdet::_base_/models/faster-rcnn_r50-caffe-dc5.py"
model = dict(
    type="mmdeform.RFCN",
    backbone=dict(out_indices=(2, 3)),
    neck=dict(type="mmdeform.TopReduction", in_channels=2048, out_channels=1024),
    rpn_head=dict(
        type="mmdeform.RPNHead",
        in_channels=1024,
        in_indices=(0,),
        feat_channels=512,
        anchor_generator=dict(scales=[8, 16, 32]),
        loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9),
    ),
    roi_head=dict(
        _delete_=True,
        type="mmdeform.RFCNRoIHead",
        bbox_head=dict(
            type="mmdeform.RFCNBBoxHead",
            in_channels=1024,
            num_classes=80,
            featmap_stride=16,
            roi_layer=dict(type="mmdeform.DeformPSRoIPool", output_size=7, sample_per_part=4),
            reg_class_agnostic=True,
            ohem=128,
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=6000, max_per_img=300),
        rcnn=dict(sampler=dict(num=1000, pos_fraction=1.0)),  # of 300 and the objects: all
    ),
    test_cfg=dict(
        rpn=dict(max_per_img=300),
        rcnn=dict(score_thr=0.001, nms=dict(iou_threshold=0.3)),
    ),
)
