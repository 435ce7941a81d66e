# 12 epochs for InternImage and its like: AdamW at 1e-4 for 16 images in a batch, steps at 8 and 11.
# The rate of decay is where a detector gets its own; 1 is none. Vectors have no weight decay.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=0.0001, weight_decay=0.05),
    constructor="mmdeform.LayerDecayConstructor",
    paramwise_cfg=dict(decay_rate=1.0),
)
