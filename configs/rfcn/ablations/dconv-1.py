_base_ = "../{{$RFCN_BASE:rfcn_r101_voc0712}}.py"
model = dict(
    type="mmdeform.Transplant",
    model=_base_.model.type,
    rules=[dict(select="backbone.layer4.2.conv2", type="mmdeform.DCN", deform_groups=4)],
)
