# Deformable ConvNets v1, as in the authors' code: 7 epochs over every image and its mirror image, a
# rate of 0.0005 for each image of a batch. It drops after 2/3, here after a whole epoch.
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=14, val_interval=1)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [
    dict(type="ConstantLR", factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=14, by_epoch=True, milestones=[10], gamma=0.1),
]
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="SGD", lr=0.002, momentum=0.9, weight_decay=0.0005)
)
auto_scale_lr = dict(enable=False, base_batch_size=4)
