# Dense attention to compare deformable attention with: of the size, and trained like, the small
# Deformable DETR, without refinement.
_base_ = [
    "../_base_/models/detr-dc5_r50-small.py",
    "../_base_/datasets/shapes_instance.py",
    "../_base_/schedules/shapes_detr_12e.py",
    "../_base_/shapes_runtime.py",
]
train_dataloader = dict(batch_size=4)
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
