"""docs/differences.md: each number that differs has a recipe or a reason, and the recipes work."""

import re
from pathlib import Path

import pytest
import runs
import torch
from torch import nn

import k_diffusion as K
from k_diffusion.models.image_v1 import ImageDenoiserModelV1
from k_diffusion.training.optim import make_optimizer

PAGE = (Path(__file__).parents[1] / "docs" / "differences.md").read_text()
TABLE = PAGE.split("## Every number that can differ")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\| (.*?) \| (.*) \|$", TABLE, re.M)[1:])


def recipe(start):
    """The first code of the row that starts so."""
    (cell,) = (cell for number, cell in ROWS.items() if number.startswith(start))
    return re.search("`(.*?)`", cell).group(1)


def test_every_number_has_a_recipe_or_a_reason():
    assert len(ROWS) > 25
    for number, cell in ROWS.items():
        assert (
            cell.startswith("none, because ") or "`" in cell or cell.startswith(("1,", "leave "))
        ), number


def test_flags_and_variables_exist():
    code = "".join(p.read_text() for p in Path(K.__file__).parent.rglob("*.py"))
    names = re.findall(r"(--[\w-]+|K_DIFFUSION_\w+)", "".join(ROWS.values()))
    assert len(names) > 3
    assert not [name for name in names if name not in code]


def test_truncated_images():
    x = torch.linspace(-1.2, 1.2, 997).view(1, 1, -1)
    got = eval(recipe("8-bit images"))
    levels = (x.clamp(-1, 1).double() + 1) * 127.5
    assert torch.equal(got, levels.floor().byte())
    rounded = torch.tensor(list(K.utils.to_pil_image(x).getdata()))
    assert set((rounded - got.flatten()).tolist()) == {0, 1}


def test_attention_dropout_in_eval_mode():
    torch.manual_seed(0)
    model = ImageDenoiserModelV1(3, 16, [1], [64], [True], dropout_rate=0.5).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    x, sigma = torch.randn(1, 3, 8, 8), torch.ones(1)
    assert torch.equal(model(x, sigma), model(x, sigma))
    exec(recipe("`image_v1` with `dropout_rate`"))
    assert not torch.equal(model(x, sigma), model(x, sigma))
    kinds = {type(m).__name__ for m in model.modules() if m.training}
    assert kinds == {"SelfAttention2d"}


@pytest.mark.parametrize("k", [2, 8])
def test_the_learning_rate_by_micro_batch(k):
    """After its warmup to rounding, and during it to the steps of one batch."""

    def rates(steps, **options):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        sched = K.utils.InverseLR(optimizer, **options)
        out = []
        for _ in range(steps):
            out.append(sched.get_last_lr()[0])
            optimizer.step()
            sched.step()
        return torch.tensor(out, dtype=torch.float64)

    assert recipe("learning rate under") == "lr_sched.inv_gamma / k"
    inv_gamma, warmup = 40.0, 0.99
    by_batch = rates(40 * k, inv_gamma=inv_gamma, power=0.5)[::k]
    torch.testing.assert_close(rates(40, inv_gamma=inv_gamma / k, power=0.5), by_batch)
    by_batch = rates(40 * k, inv_gamma=inv_gamma, power=0.5, warmup=warmup)[k - 1 :: k]
    got = rates(40, inv_gamma=inv_gamma / k, power=0.5, warmup=warmup**k)
    torch.testing.assert_close(got, by_batch, rtol=0.1, atol=0)


def test_the_optimizer_without_fused_kernels():
    config = runs.tiny_config()
    model = K.config.make_model(config)
    optimizer = eval(recipe("AdamW and SGD").replace("K.training.optim.", ""))
    assert not optimizer.defaults["fused"]
    assert make_optimizer(config, model).defaults["fused"]


def test_frequencies_in_half_precision():
    names = {"state": K.config.make_model(runs.tiny_config()).state_dict()}
    got = eval(recipe("`convert_for_inference.py`"), names)
    assert {v.dtype for v in got.values()} == {torch.float16}


def test_a_data_set_without_classes():
    config = K.config.load_config(
        {**runs.TINY, "dataset": {"type": "imagefolder-class", "location": "x", "num_classes": 0}}
    )
    assert recipe("`imagefolder-class` without") == '"num_classes": 0'
    assert config["dataset"]["num_classes"] == 0


def test_a_loss_of_one_scale():
    class Zero(nn.Module):
        def forward(self, x, sigma):
            return torch.zeros_like(x)

    x, noise, sigma = torch.ones(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.ones(2)
    one, two = (
        K.layers.SimpleLossDenoiser(Zero(), sigma_data=0.5, scales=s).loss(x, noise, sigma)
        for s in (1, 2)
    )
    assert not torch.allclose(one, two)
    plain = K.layers.SimpleLossDenoiser(Zero(), sigma_data=0.5).loss(x, noise, sigma)
    assert torch.equal(one, plain)
