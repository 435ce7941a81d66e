# The same for COCO: 8 epochs over every image and its mirror image.
_base_ = "./dcn_14e.py"
train_cfg = dict(max_epochs=16)
param_scheduler = [
    dict(type="ConstantLR", factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", begin=0, end=16, by_epoch=True, milestones=[11], gamma=0.1),
]
