_base_ = "mmdet::_base_/models/retinanet_r50_fpn.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdeform.DAT",
        arch="tiny",
        version="v1",
        out_indices=(1, 2, 3),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[192, 384, 768], start_level=0),
)
