# The reference of the small configs: each of the others differs from it in one thing.
_base_ = [
    "../_base_/models/deformable-detr_r50-small.py",
    "../_base_/datasets/shapes_instance.py",
    "../_base_/schedules/shapes_detr_12e.py",
    "../_base_/shapes_runtime.py",
]
train_dataloader = dict(batch_size=4)
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
