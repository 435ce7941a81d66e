# The small Faster R-CNN in the form of the deformable papers: no pyramid, stride 16 and dilation in
# c5, the RPN on c4 and the RoI head on c5 with its channels reduced.
_base_ = "./faster-rcnn_r50-small.py"
model = dict(
    backbone=dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), out_indices=(2, 3)),
    neck=dict(
        _delete_=True,
        type="mmdeform.TopReduction",
        in_channels=512,
        out_channels=64,
        norm_cfg=dict(type="BN", requires_grad=True),
    ),
    rpn_head=dict(
        type="mmdeform.RPNHead",
        in_channels=256,
        in_indices=(0,),
        anchor_generator=dict(scales=[1, 2, 4, 8], strides=[16]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            type="mmdeform.SingleRoIExtractor", in_indices=(1,), featmap_strides=[16]
        )
    ),
)
