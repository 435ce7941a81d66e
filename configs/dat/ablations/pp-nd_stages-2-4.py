_base_ = "./pp-nd.py"
model = dict(backbone=dict(stage_specs=("NN", "ND", "NDNDND", "DD")))
