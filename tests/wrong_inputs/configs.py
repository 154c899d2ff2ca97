"""Wrong values in a config, each a change to `runs.TINY`."""

from typing import Any

from .table import Row


def wrong(says: str, /, **changes: Any) -> Row:
    """A changed config for train.py; `__` stands for the dot of a key's path."""
    return Row("train", "", says, 1, {k.replace("__", "."): v for k, v in changes.items()})


V1 = {
    "type": "image_v1",
    "input_channels": 1,
    "input_size": [8, 8],
    "mapping_out": 16,
    "depths": [1],
    "channels": [16],
    "self_attn_depths": [False],
    "sigma_sample_density": {"type": "lognormal", "mean": 0.0, "std": 1.0},
}
HUGE = 2**29
ROWS = [
    # ---- types
    wrong("model: .*got 3", model=3),
    wrong("model: .*got None", model=None),
    wrong("model: .*got \\[\\]", model=[]),
    wrong("model: needs a 'type'", model={}),
    wrong("dataset: .*got 'digits'", dataset="digits"),
    wrong("optimizer: .*got \\[1\\]", optimizer=[1]),
    wrong("ema_sched: .*got 1", ema_sched=1),
    wrong("unknown key 'modle' \\(did you mean 'model'", modle={}),
    wrong("model.type: unknown type 'unet'", model__type="unet"),
    wrong("model.type: unknown type 7|model.type: .*7", model__type=7),
    wrong("model.input_channels: .*got 0", model__input_channels=0),
    wrong("model.input_channels: .*got 1.5", model__input_channels=1.5),
    wrong("model.input_channels: .*got '1'", model__input_channels="1"),
    wrong("model.input_channels: .*got True", model__input_channels=True),
    wrong("model.input_channels is 7, but images have 1, 2, 3, 4", model__input_channels=7),
    wrong("model.input_size: .*got \\[8\\]", model__input_size=[8]),
    wrong("model.input_size: .*\\[8, 8, 8\\]", model__input_size=[8, 8, 8]),
    wrong("model.input_size\\[0\\]: .*got -8", model__input_size=[-8, 8]),
    wrong("input_size \\[9, 8\\] does not divide by \\[4, 4\\]", model__input_size=[9, 8]),
    wrong("model.input_size: is required", model__input_size=None),
    wrong("model.patch_size\\[1\\]: .*got 0", model__patch_size=[2, 0]),
    wrong("model.patch_size: .*got 'two'", model__patch_size="two"),
    wrong("^train.py: error: model.input_channels: .*got 0; optimizer.lr: .*got 0; lr_sched.warmup",
          model__input_channels=0, optimizer__lr=0, lr_sched__warmup=1),
    # ---- lists
    wrong("model.depths: .*at least 1 item", model__depths=[]),
    wrong("one entry a level|one entry per level", model__depths=[1]),
    wrong("model.depths\\[0\\]: .*got -1", model__depths=[-1, 1]),
    wrong("model.depths\\[0\\]: .*less than or equal to 1000", model__depths=[10**9, 1]),
    wrong("model.depths: .*at most 16 items", model__depths=[1] * 100),
    wrong("widths has 0", model__widths=[]),
    wrong("model.widths\\[1\\]: .*got None", model__widths=[16, None]),
    wrong("d_ffs has 1", model__d_ffs=[16]),
    wrong("model.self_attns\\[0\\].type: unknown type 'local'",
          model__self_attns=[{"type": "local"}, {"type": "none"}]),
    wrong("model.self_attns\\[1\\]: .*got 3", model__self_attns=[{"type": "none"}, 3]),
    wrong("unknown key 'kernal_size' \\(did you mean 'kernel_size'",
          model__self_attns=[{"type": "neighborhood", "kernal_size": 3}, {"type": "none"}]),
    wrong("self_attns\\[0\\].*kernel", model__self_attns=[
        {"type": "neighborhood", "d_head": 8, "kernel_size": 99}, {"type": "none"}]),
    wrong("self_attns\\[0\\].*16.*7", model__self_attns=[
        {"type": "global", "d_head": 7}, {"type": "none"}]),
    wrong("backend", model__self_attns=[
        {"type": "global", "d_head": 8, "backend": "fast"}, {"type": "none"}]),
    wrong("dropout_rate.*got 1.5|dropout_rate", model__dropout_rate=1.5),
    wrong("dropout_rate has 3", model__dropout_rate=[0.1, 0.1, 0.1]),
    wrong("model.depths: .*at least 1 item", model={**V1, "depths": []}),
    wrong("channels has 2", model={**V1, "channels": [16, 16]}),
    wrong("self_attn_depths\\[0\\]: .*got 1", model={**V1, "self_attn_depths": [1]}),
    wrong("model.depths\\[0\\]: .*got 0", model={**V1, "depths": [0]}),
    # ---- numbers
    wrong("numbers must be finite, got NaN", model__sigma_data=float("nan")),
    wrong("numbers must be finite, got Infinity", model__sigma_max=float("inf")),
    wrong("numbers must be finite, got -Infinity", optimizer__weight_decay=float("-inf")),
    wrong("model.sigma_data: .*got 0", model__sigma_data=0),
    wrong("model.sigma_data: .*got -1", model__sigma_data=-1),
    wrong("sigma_min 40.0 must be below sigma_max 40.0|sigma_min 40", model__sigma_min=40),
    wrong("model.augment_prob: .*got 2", model__augment_prob=2),
    wrong("model.loss_scales: .*got 0", model__loss_scales=0),
    wrong("model.loss_config: .*got 'l2'", model__loss_config="l2"),
    wrong("skip_stages needs an image_v1 model, got 1", model__skip_stages=1),
    wrong("has_variance needs a model with a variance head", model__has_variance=True),
    wrong("optimizer.lr: .*got 0", optimizer__lr=0),
    wrong("optimizer.lr: .*got -0.1", optimizer__lr=-0.1),
    wrong("optimizer.lr: .*got '1e-4'", optimizer__lr="1e-4"),
    wrong("numbers must be finite", optimizer__lr=float("nan")),
    wrong("optimizer.betas: .*\\[0.9\\]", optimizer__betas=[0.9]),
    wrong("optimizer.betas\\[1\\]: .*got 1.0", optimizer__betas=[0.9, 1.0]),
    wrong("optimizer.eps: .*got 0", optimizer__eps=0),
    wrong("optimizer.max_grad_norm: .*got 0", optimizer__max_grad_norm=0),
    wrong("optimizer.type: unknown type 'adam' \\(did you mean", optimizer__type="adam"),
    wrong("lr_sched.warmup: .*got 1", lr_sched__warmup=1),
    wrong("lr_sched.inv_gamma: .*got 0", lr_sched__inv_gamma=0),
    wrong("lr_sched.min_lr: 0.5 is above optimizer.lr, 0.002", lr_sched__min_lr=0.5),
    wrong("lr_sched.num_steps: is required", lr_sched={"type": "exponential"}),
    wrong("ema_sched: min_value 0.995 is above max_value 0.99", ema_sched__min_value=0.995),
    wrong("ema_sched.max_value: .*got 1.5", ema_sched__max_value=1.5),
    wrong("numbers must be finite", ema_sched__power=float("inf")),
    # ---- noise levels
    wrong("model.sigma_sample_density: needs a 'type'", model__sigma_sample_density={}),
    wrong("model.sigma_sample_density: .*got 'lognormal'", model__sigma_sample_density="lognormal"),
    wrong("std: .*got 0", model__sigma_sample_density={"type": "lognormal", "mean": 0, "std": 0}),
    wrong("mean", model__sigma_sample_density={"type": "lognormal", "std": 1}),
    wrong("mean: .*got 1e\\+300|mean", model__sigma_sample_density={
        "type": "lognormal", "mean": 1e300, "std": 1}),
    *(
        wrong(f"sigma_sample_density: min_value {low} must be below max_value {high}",
              model__sigma_sample_density={"type": kind, "min_value": low, "max_value": high})
        for kind in ("loglogistic", "loguniform", "v-diffusion", "cosine-interpolated")
        for low, high in [(2.0, 1.0)]
    ),
    wrong("min_value 50.0 must be below max_value 40", model__sigma_sample_density={
        "type": "loguniform", "min_value": 50.0}),
    # ---- sizes beyond memory
    wrong("model: the model's weights would take .* GiB", model__widths=[16, 2**22],
          model__d_ffs=[16, 2**22]),
    wrong("model: .*(sizes are too large|GiB)", model__widths=[HUGE, HUGE]),
    wrong("model: .*(sizes are too large|GiB)", dataset__num_classes=2**31 - 1),
    wrong("less than 2147483648", dataset__num_classes=10**30),
    wrong("an image of .* would take", model__input_size=[2**20, 2**20]),
    wrong("less than 2147483648", model__widths=[16, 2**40]),
    wrong("model: .*GiB", model={**V1, "channels": [2**20]}),
    # ---- data
    wrong("dataset.type: unknown type 'image'", dataset__type="image"),
    wrong("dataset.num_classes: .*got -1", dataset__num_classes=-1),
    wrong("num_classes is 3, but there are 10 digits", dataset__num_classes=3),
    wrong("cond_dropout_rate: .*got -0.5", dataset__cond_dropout_rate=-0.5),
    wrong("needs a colour such as 'white'.*'whiteish'", dataset__background="whiteish"),
    wrong("dataset.split: .*got 'valid'", dataset__split="valid"),
    wrong("has no image that `transform` was applied to at 5", dataset__image_key=5),
    wrong("dataset.type is 'none'|no data to train on", dataset={"type": "none"}),
]  # fmt: skip
