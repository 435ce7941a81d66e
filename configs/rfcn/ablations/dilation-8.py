_base_ = "../{{$RFCN_BASE:rfcn_r101_voc0712}}.py"
model = dict(backbone=dict(dilations=(1, 1, 1, 8)))
