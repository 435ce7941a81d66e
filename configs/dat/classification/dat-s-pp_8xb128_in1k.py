_base_ = "./dat-t-v1_8xb128_in1k.py"
model = dict(backbone=dict(arch="small", version="pp"))
