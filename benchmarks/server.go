// The server in Go, with the package net: one goroutine in a loop of ReadFromUDPAddrPort.
//
//	server echo|once|out|flight|in|fan    prints its port, then serves on it until it is killed
//
// traffic.py describes each mode. The names in capitals are environment variables, with the values of traffic.py.
package main

import (
	"fmt"
	"log"
	"net"
	"net/netip"
	"os"
	"strconv"
	"time"
)

func number(name string) int {
	value, err := strconv.Atoi(os.Getenv(name))
	check(err)
	return value
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

func main() {
	what := os.Args[1]
	burst := 0
	switch what {
	case "out":
		burst = number("OUT_BURST")
	case "flight":
		burst = number("FLIGHT")
	}
	stream := make([][]byte, burst)
	for index := range stream {
		stream[index] = make([]byte, number("STREAM_SIZE"))
		stream[index][0] = byte(index)
	}
	inBurst, acknowledgement := number("IN_BURST"), number("ACKNOWLEDGEMENT")
	join := os.Getenv("JOIN")[0]
	time.AfterFunc(time.Duration(number("LONGEST_LIFE"))*time.Second, func() { os.Exit(1) })

	socket, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	check(err)
	check(socket.SetReadBuffer(number("RECEIVE_BUFFER")))
	fmt.Println(socket.LocalAddr().(*net.UDPAddr).Port)

	room := make([]byte, 65536)
	counted := 0
	var members []netip.AddrPort
	send := func(payload []byte, peer netip.AddrPort) {
		_, err := socket.WriteToUDPAddrPort(payload, peer)
		check(err)
	}
	for {
		size, peer, err := socket.ReadFromUDPAddrPort(room)
		check(err)
		payload := room[:size]
		switch {
		case burst > 0:
			for _, datagram := range stream {
				send(datagram, peer)
			}
		case what == "in":
			counted++
			if counted%inBurst == 0 {
				send(payload[:acknowledgement], peer)
			}
		case what == "fan" && (size == 0 || payload[0] != join):
			for _, member := range members {
				send(payload, member)
			}
		default:
			if what == "fan" {
				members = append(members, peer)
			}
			send(payload, peer)
		}
	}
}
