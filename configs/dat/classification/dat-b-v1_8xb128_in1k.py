_base_ = "./dat-t-v1_8xb128_in1k.py"
model = dict(backbone=dict(arch="base"), head=dict(in_channels=1024))
# The authors train this one more gently: 4e-4 for 512 images, 50 epochs of warm-up.
optim_wrapper = dict(optimizer=dict(lr=0.0008), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.00125, by_epoch=True, end=50, convert_to_iter_based=True),
    dict(
        type="CosineAnnealingLR",
        eta_min=1e-5,
        by_epoch=True,
        begin=50,
        end=300,
        convert_to_iter_based=True,
    ),
]
