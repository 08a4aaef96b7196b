"""Publishing a teacher folder."""

import json
from pathlib import Path

from experiments.emoji.assemble import _publish


def test_a_published_folder_is_readable_and_names_no_machine(tmp_path: Path) -> None:
    file = tmp_path / "vae" / "config.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"_name_or_path": "/home/me/vae", "latent_channels": 8}))
    file.chmod(0o600)
    _publish(tmp_path)
    assert json.loads(file.read_text()) == {"latent_channels": 8}
    assert file.stat().st_mode & 0o777 == 0o644
