_base_ = "./dat-t-v1_8xb128_in1k.py"
model = dict(backbone=dict(arch="base", version="pp"), head=dict(in_channels=1024))
train_dataloader = dict(batch_size=64)
