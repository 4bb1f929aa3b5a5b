"""The handler that ``python -m trio_udp`` serves if it is given none."""

from .. import Client


async def echo(client: Client) -> None:
    async for payload in client:
        await client.send(payload)
