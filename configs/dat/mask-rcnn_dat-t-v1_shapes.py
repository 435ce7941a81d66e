_base_ = [
    "../_base_/models/mask-rcnn_r50-small.py",
    "../_base_/datasets/shapes_instance.py",
    "../_base_/schedules/shapes_12e.py",
    "../_base_/shapes_runtime.py",
]
# DAT-T with a quarter of the channels, and windows that divide the maps of 160 x 160 images.
dims = (24, 48, 96, 192)
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdeform.DAT",
        arch="tiny",
        version="v1",
        img_size=160,
        stem_dims=dims[0],
        dims=dims,
        window_sizes=5,
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=list(dims)),
)
optim_wrapper = dict(optimizer=dict(lr=0.001))
