import runs
import torch

import k_diffusion as K
from k_diffusion.training import optim
from k_diffusion.training.state import TrainState


def make_state(seed):
    config = runs.tiny_config()
    model = K.config.make_model(config)
    opt = optim.make_optimizer(config, model)
    return TrainState(
        config=config,
        model=model,
        model_ema=K.config.make_model(config),
        opt=opt,
        sched=optim.make_lr_sched(config, opt),
        ema_sched=optim.make_ema_sched(config),
        seed=seed,
        dataset_length=100,
    )


def test_a_checkpoint_brings_its_seed_and_its_demos():
    """A run resumed without --seed has drawn another one by then."""
    saved, new = make_state(3), make_state(4)
    torch.rand(5, generator=saved.demo_gen)
    new.load_state_dict(saved.state_dict(), "x.pth")
    assert new.seed == 3
    assert torch.equal(new.demo_gen.get_state(), saved.demo_gen.get_state())
    # those of older versions have no seed
    old = {k: v for k, v in saved.state_dict().items() if k != "seed"}
    other = make_state(4)
    other.load_state_dict(old, "x.pth")
    assert other.seed == 4
    assert torch.equal(other.demo_gen.get_state(), saved.demo_gen.get_state())
