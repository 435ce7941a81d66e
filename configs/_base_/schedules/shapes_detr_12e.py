# 12 epochs from scratch with the rates of Deformable DETR: a tenth for what says where to look.
_base_ = "./shapes_12e.py"
optim_wrapper = dict(
    optimizer=dict(lr=0.0005, weight_decay=0.0001),
    clip_grad=dict(max_norm=0.1),
    paramwise_cfg=dict(
        custom_keys={"sampling_offsets": dict(lr_mult=0.1), "reference_points": dict(lr_mult=0.1)}
    ),
)
max_epochs = 12
param_scheduler = [
    dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=100),
    dict(
        type="CosineAnnealingLR",
        begin=0,
        end=max_epochs,
        T_max=max_epochs,
        eta_min=0,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
