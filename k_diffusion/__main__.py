"""`python -m k_diffusion`: what is installed, and where the scripts are."""

import textwrap

from . import __version__

TEXT = f"""
k-diffusion {__version__} is a library: `import k_diffusion as K`. Installed is its code alone. The
scripts that train, sample and convert (train.py, sample.py, sample_clip_guided.py,
convert_for_inference.py), their configs/, examples/ and docs/ are in the source distribution
(k_diffusion-{__version__}.tar.gz) and in a clone of the repository; what they need is installed by
pip install "k-diffusion[train]". `python -m k_diffusion.config [CHECKPOINT]` prints the schema of
configs or the config of a checkpoint, `python -m k_diffusion.models.attention` the attention
backends of this machine.
"""

if __name__ == "__main__":
    print(textwrap.fill(" ".join(TEXT.split()), 88, break_on_hyphens=False))
