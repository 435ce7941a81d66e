# Sixteen epochs, the authors' eight of images and mirror images, for eight images in a batch:
# 0.0005 for each. The authors' rate drops after two thirds of the epochs, here after the eleventh.
_base_ = "./sgd_7e_voc0712.py"
train_cfg = dict(max_epochs=16)
optim_wrapper = dict(optimizer=dict(lr=0.004))
param_scheduler = [
    dict(type="ConstantLR", factor=0.1, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", milestones=[11], gamma=0.1, by_epoch=True, begin=0, end=16),
]
auto_scale_lr = dict(base_batch_size=8)
