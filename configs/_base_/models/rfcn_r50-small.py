# R-FCN for 160 x 160 images and a CPU: ResNet-50 with a quarter of the channels, trained from
# scratch. Objects are 20 to 80 pixels wide: c4 and c5 have a stride of 8, not 16, by dilations of 2
# and 4.
_base_ = "./faster-rcnn_r50-small.py"
model = dict(
    type="mmdeform.RFCN",
    backbone=dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), out_indices=(2, 3)),
    neck=dict(
        _delete_=True,
        type="mmdeform.TopReduction",
        in_channels=512,
        out_channels=128,
        norm_cfg=dict(type="BN", requires_grad=True),
    ),
    rpn_head=dict(
        type="mmdeform.RPNHead",
        in_channels=256,
        in_indices=(0,),
        anchor_generator=dict(scales=[2, 4, 8], strides=[8]),
    ),
    roi_head=dict(
        _delete_=True,
        type="mmdeform.RFCNRoIHead",
        bbox_head=dict(
            type="mmdeform.RFCNBBoxHead",
            in_channels=128,
            num_classes=5,
            featmap_stride=8,
            roi_layer=dict(type="mmdeform.DeformPSRoIPool", output_size=7, sample_per_part=4),
            reg_class_agnostic=True,
            ohem=64,
        ),
    ),
    train_cfg=dict(rcnn=dict(sampler=dict(num=1000, pos_fraction=1.0))),
)
