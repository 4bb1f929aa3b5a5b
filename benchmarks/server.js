// The server in JavaScript, with Node's module dgram.
//
//     node server.js echo|once|out|flight|in|fan    prints its port, then serves on it until it is killed
//
// traffic.py describes each mode. The names in capitals are environment variables, with the values of traffic.py.
"use strict";
const dgram = require("node:dgram");

const number = (name) => Number(process.env[name]);
const what = process.argv[2];
const burst = { out: number("OUT_BURST"), flight: number("FLIGHT") }[what] ?? 0;
const stream = Array.from({ length: burst }, (_, index) => Buffer.alloc(number("STREAM_SIZE")).fill(index, 0, 1));
const inBurst = number("IN_BURST");
const acknowledgement = number("ACKNOWLEDGEMENT");
const join = process.env.JOIN.charCodeAt(0);
setTimeout(() => process.exit(1), number("LONGEST_LIFE") * 1000);

const socket = dgram.createSocket("udp4");
const members = [];
let counted = 0;
socket.on("message", (payload, peer) => {
  if (burst) {
    for (const datagram of stream) socket.send(datagram, peer.port, peer.address);
  } else if (what === "in") {
    if (++counted % inBurst === 0) socket.send(payload.subarray(0, acknowledgement), peer.port, peer.address);
  } else if (what === "fan" && payload[0] !== join) {
    for (const member of members) socket.send(payload, member.port, member.address);
  } else {
    if (what === "fan") members.push(peer);
    socket.send(payload, peer.port, peer.address);
  }
});
socket.bind(0, "127.0.0.1", () => {
  socket.setRecvBufferSize(number("RECEIVE_BUFFER"));
  console.log(socket.address().port);
});
