# Shorter sides of 600 pixels, longer ones of 1000 at most, one image per GPU.
_base_ = "mmdet::_base_/datasets/coco_detection.py"
resize = dict(type="Resize", scale=(1000, 600), keep_ratio=True)
train_pipeline = [resize if step.type == "Resize" else step for step in _base_.train_pipeline]
test_pipeline = [resize if step.type == "Resize" else step for step in _base_.test_pipeline]
train_dataloader = dict(batch_size=1, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
