# The norm of the backbone's last map is the published classifier's own.
model = dict(
    type="ImageClassifier",
    backbone=dict(type="mmdeform.DAT", arch="tiny", version="v1", out_indices=(3,)),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead",
        num_classes=1000,
        in_channels=768,
        init_cfg=None,  # as published: PyTorch's
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
        cal_acc=False,
    ),
    train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]),
)
