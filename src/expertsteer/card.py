"""The card that goes to the hub with a pack."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from expertsteer.pack import SteeringPack

__all__ = ["pack_card"]


def pack_card(pack: SteeringPack, repo_id: str) -> str:
    """Return a README for a pack on the Hugging Face hub.

    Parameters
    ----------
    pack : SteeringPack
    repo_id : str
        "owner/name".

    Returns
    -------
    str
        Markdown with the hub's YAML header.
    """
    header = {
        "library_name": "expertsteer",
        "tags": ["steering-vectors", "activation-steering"],
    }
    if _may_be_on_the_hub(pack.target.name):
        header["base_model"] = pack.target.name
    expert = pack.expert.name if pack.expert else "the target itself"
    rows = "\n".join(
        f"| {p.expert_layer} | {p.target_layer} | {pack.mean_residual_norms[p.target_layer]:,.1f} |"
        for p in pack.pairs
        if p.target_layer in pack.vectors
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# Steering pack for {pack.target.name}

Steers `{pack.target.name}` at inference with vectors of {expert}; no weights change.

```python
from expertsteer import SteeringPack

pack = SteeringPack.from_hub("{repo_id}")
with pack.apply(model, strength={pack.strength:g}):
    model.generate(...)
```

| expert layer | target layer | mean residual norm |
|---|---|---|
{rows}

Made for weights `{pack.target.weights}` ({pack.target.n_layers} blocks, width
{pack.target.width}); loading it for another model is refused. Steering changes what a model
says in ways its makers did not test. What this pack does beyond the behaviour it was made for
has not been measured.

## Provenance

```yaml
{yaml.safe_dump(pack.provenance, sort_keys=False).strip()}
```
"""


def _may_be_on_the_hub(name: str) -> bool:
    """Tell hub ids from local folders, which the hub refuses as a base model."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()
