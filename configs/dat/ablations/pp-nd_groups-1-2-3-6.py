_base_ = "./pp-nd.py"
model = dict(backbone=dict(num_groups=(1, 2, 3, 6)))
