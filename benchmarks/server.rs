//! The server in Rust, with its standard library: a blocking `UdpSocket` and one loop.
//!
//!     server echo|once|out|flight|in|fan    prints its port, then serves on it until it is killed
//!
//! traffic.py describes each mode. The names in capitals are environment variables, with the values of traffic.py.

use std::env;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::io::AsRawFd;

// The standard library has no way to set a receive buffer.
extern "C" {
    fn setsockopt(fd: i32, level: i32, name: i32, value: *const i32, length: u32) -> i32;
    fn alarm(seconds: u32) -> u32;
}
const SOL_SOCKET: i32 = 1;
const SO_RCVBUF: i32 = 8;

fn number(name: &str) -> usize {
    env::var(name).expect(name).parse().expect(name)
}

fn main() -> std::io::Result<()> {
    let what = env::args().nth(1).expect("what to do");
    let burst = match what.as_str() {
        "out" => number("OUT_BURST"),
        "flight" => number("FLIGHT"),
        _ => 0,
    };
    let mut stream = vec![vec![0u8; number("STREAM_SIZE")]; burst];
    for (index, datagram) in stream.iter_mut().enumerate() {
        datagram[0] = index as u8;
    }
    let (in_burst, acknowledgement) = (number("IN_BURST"), number("ACKNOWLEDGEMENT"));
    let join = env::var("JOIN").expect("JOIN").as_bytes()[0];
    let receive_buffer = number("RECEIVE_BUFFER") as i32;

    let socket = UdpSocket::bind("127.0.0.1:0")?;
    unsafe {
        alarm(number("LONGEST_LIFE") as u32);
        setsockopt(socket.as_raw_fd(), SOL_SOCKET, SO_RCVBUF, &receive_buffer, 4);
    }
    println!("{}", socket.local_addr()?.port());

    let mut room = [0u8; 65536];
    let mut counted = 0;
    let mut members: Vec<SocketAddr> = Vec::new();
    loop {
        let (size, peer) = socket.recv_from(&mut room)?;
        let payload = &room[..size];
        match what.as_str() {
            "out" | "flight" => {
                for datagram in &stream {
                    socket.send_to(datagram, peer)?;
                }
            }
            "in" => {
                counted += 1;
                if counted % in_burst == 0 {
                    socket.send_to(&payload[..acknowledgement], peer)?;
                }
            }
            "fan" if payload.first() != Some(&join) => {
                for member in &members {
                    socket.send_to(payload, member)?;
                }
            }
            other => {
                if other == "fan" {
                    members.push(peer);
                }
                socket.send_to(payload, peer)?;
            }
        }
    }
}
