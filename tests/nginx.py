"""A real nginx with the project's own configuration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.needs import need
from tests.product.conftest import free_port
from tests.settle import eventually

ROOT = Path(__file__).parents[1]


@asynccontextmanager
async def nginx(folder: Path, app_port: int, *, default_site: str = "") -> AsyncIterator[str]:
    """The origin under which nginx serves what listens on `app_port`, as deploy/nginx.conf says.

    `default_site`: the configuration of another site on the same port, read after ours, as Debian orders them.
    """
    program = need("nginx", "nginx-light")
    port = free_port()
    ours = (ROOT / "deploy" / "nginx.conf").read_text()
    for there, here in (
        # A machine of the tests may have no IPv6.
        ("    listen 80;\n    listen [::]:80;\n", f"    listen 127.0.0.1:{port};\n"),
        ("127.0.0.1:8000", f"127.0.0.1:{app_port}"),
    ):
        assert ours.count(there) == 1, there
        ours = ours.replace(there, here)
    site = default_site.replace("listen 80 default_server;", f"listen 127.0.0.1:{port} default_server;")
    (folder / "llamalith.conf").write_text(ours + site.replace("listen [::]:80 default_server;", ""))
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = folder / "nginx.conf"
    main.write_text(
        f"pid {folder}/nginx.pid;\nerror_log {folder}/nginx.log;\ndaemon off;\nuser root;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{temporary}include {folder}/llamalith.conf;\n}}\n"
    )
    process = await asyncio.create_subprocess_exec(program, "-e", str(folder / "nginx.log"), "-c", str(main))

    async def listens() -> bool:
        assert process.returncode is None, (folder / "nginx.log").read_text()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await eventually(listens)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()
