"""The handler of ``python -m trio_udp`` without a handler."""

from .. import Client


async def echo(client: Client) -> None:
    async for payload in client:
        await client.send(payload)
