# Faster R-CNN of the deformable papers: no pyramid, stride 16 and dilation in c5, the RPN on c4,
# RoIAlign on 256 channels of c5 and two fully connected layers. The backbone is Detectron's.
_base_ = "mmdet::_base_/models/faster-rcnn_r50-caffe-dc5.py"
model = dict(
    backbone=dict(out_indices=(2, 3)),
    neck=dict(type="mmdeform.TopReduction", in_channels=2048, out_channels=256),
    rpn_head=dict(
        type="mmdeform.RPNHead",
        in_channels=1024,
        in_indices=(0,),
        feat_channels=1024,
        loss_bbox=dict(type="SmoothL1Loss", beta=1 / 9),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            type="mmdeform.SingleRoIExtractor",
            in_indices=(1,),
            roi_layer=dict(sampling_ratio=2),
            out_channels=256,
        ),
        bbox_head=dict(in_channels=256, loss_bbox=dict(type="SmoothL1Loss", beta=1.0)),
    ),
)
