# Seven epochs of VOC 07+12 and its mirror images, for four images in a batch: 0.0005 for each. The
# authors' rate drops after 4.83 epochs; here it does at the end of the fifth.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=7, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.002, momentum=0.9, weight_decay=0.0005),
    paramwise_cfg=dict(custom_keys=dict(neck=dict(lr_mult=3.0))),
)
param_scheduler = [
    dict(type="ConstantLR", factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", milestones=[5], gamma=0.1, by_epoch=True, begin=0, end=7),
]
auto_scale_lr = dict(enable=False, base_batch_size=4)
