#!/bin/sh
# Give the servers' answers to nginx, although their destination is the client (see nginx.conf). Run this as root after
# each boot. To undo it: nft delete table inet nginx_udp; ip rule delete fwmark 9999; ip route delete local 0/0 dev lo table 9999
set -eu

ip rule add fwmark 9999 lookup 9999
ip route add local 0.0.0.0/0 dev lo table 9999

# Answers and refusals. Without the refusals nginx does not notice that a server has died.
nft -f - <<'RULES'
table inet nginx_udp {
    set servers {
        type ipv4_addr
        elements = { 10.0.0.11, 10.0.0.12 }
    }

    chain prerouting {
        type filter hook prerouting priority mangle
        ip saddr @servers udp sport 9999 meta mark set 9999
        ip saddr @servers icmp type destination-unreachable meta mark set 9999
    }
}
RULES
