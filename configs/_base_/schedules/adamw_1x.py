# 12 epochs for pretrained transformers: AdamW, steps at 8 and 11. The learning rate is that of
# two-stage detectors and 64 images in a batch.
_base_ = "mmdet::_base_/schedules/schedule_1x.py"
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=0.0004, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        custom_keys={
            "norm": dict(decay_mult=0.0),
            "absolute_pos_embed": dict(decay_mult=0.0),
            "relative_position_bias_table": dict(decay_mult=0.0),
            "rpe_table": dict(decay_mult=0.0),
            "rpb": dict(decay_mult=0.0),
        },
    ),
)
auto_scale_lr = dict(base_batch_size=64)
