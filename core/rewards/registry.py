"""Names to reward models; others are added by ``register_reward``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from core.backbones.base import Backbone
from core.config import UserError
from core.identity import locate
from core.rewards.base import Reward
from core.rewards.known import KNOWN_REWARDS, KnownReward

Load = Callable[[Path, Backbone], Reward]
REWARDS: dict[str, Load] = {}


def register_reward(row: KnownReward, load: Load) -> None:
    """Make a reward model selectable as ``method.rl.reward=NAME``."""
    KNOWN_REWARDS[row.name], REWARDS[row.name] = row, load


def load_reward(name: str, path: str | None, backbone: Backbone) -> Reward:
    """The reward model ``name`` with the weights in the folder ``path``, for pictures or latents of ``backbone``.

    Raises: UserError: no path, no such folder or file, or weights of another network.
    """
    row = KNOWN_REWARDS[name]
    if row.file and path is None:
        raise UserError(row.needed())
    folder = locate(path or "")
    if row.file and not (folder / row.file).is_file():
        raise UserError(f"method.rl.reward_path={path}: no file {row.file} there; {row.needed()}")
    return REWARDS[name](folder, backbone)
