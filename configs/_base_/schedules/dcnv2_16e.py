# 16 epochs of Deformable ConvNets v2; the warm-up is mmdet's.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"
train_cfg = dict(max_epochs=16)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=16, by_epoch=True, milestones=[10, 14], gamma=0.1),
]
