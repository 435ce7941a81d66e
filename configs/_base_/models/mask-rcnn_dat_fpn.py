_base_ = "mmdet::_base_/models/mask-rcnn_r50_fpn.py"
model = dict(
    backbone=dict(
        _delete_=True, type="mmdeform.DAT", arch="tiny", version="v1", drop_path_rate=0.0
    ),
    # The fifth level is a convolution, as in the published detectors, and not mmdet's max pooling.
    neck=dict(in_channels=[96, 192, 384, 768], add_extra_convs="on_input"),
)
