# The plain twin of the small detectors without a pyramid.
_base_ = [
    "../_base_/models/faster-rcnn_r50-dc5-small.py",
    "../_base_/datasets/shapes_instance.py",
    "../_base_/schedules/shapes_12e.py",
    "../_base_/shapes_runtime.py",
]
val_evaluator = dict(metric="bbox")
test_evaluator = val_evaluator
