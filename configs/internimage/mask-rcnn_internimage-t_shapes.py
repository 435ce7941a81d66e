_base_ = [
    "../_base_/models/mask-rcnn_r50-small.py",
    "../_base_/datasets/shapes_instance.py",
    "../_base_/schedules/shapes_12e.py",
    "../_base_/shapes_runtime.py",
]
# InternImage-T with a quarter of the channels and 12 blocks instead of 30.
channels = 16
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmdeform.InternImage",
        arch="tiny",
        channels=channels,
        depths=(2, 2, 6, 2),
        groups=(1, 2, 4, 8),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[channels * 2**stage for stage in range(4)]),
)
optim_wrapper = dict(optimizer=dict(lr=0.001))
