_base_ = "mmdet::_base_/default_runtime.py"
custom_imports = dict(imports=["mmdeform"], allow_failed_imports=False)
default_hooks = dict(
    # Two, because the oldest goes before the next is written: one is always left to resume from.
    checkpoint=dict(type="CheckpointHook", interval=1, max_keep_ckpts=2),
    logger=dict(type="LoggerHook", interval=10),
)
randomness = dict(seed=0)
