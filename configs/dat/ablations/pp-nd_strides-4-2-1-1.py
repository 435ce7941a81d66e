_base_ = "./pp-nd.py"
model = dict(backbone=dict(strides=(4, 2, 1, 1)))
