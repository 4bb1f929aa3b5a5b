/* The lowest possible cost of a server: the same work in C, with many datagrams in each system call.
 *
 *     server echo|once|out|flight|in|fan [gso]    prints its port, then serves on it until it is killed
 *
 * traffic.py describes each mode. With "gso", the kernel segments a burst, as for trio_udp; otherwise each datagram is a
 * separate message. native.py defines the other names in capitals on the compiler's command line, from traffic.py. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/udp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BATCH = 64, ROOM = 2048, MOST_MEMBERS = 64 };

int main(int argc, char **argv) {
    static char payload[BATCH][ROOM], stream[OUT_BURST][STREAM_SIZE];
    static struct sockaddr_in peers[BATCH];
    static struct iovec iov[BATCH], stream_iov[OUT_BURST];
    static struct mmsghdr headers[BATCH], stream_headers[OUT_BURST];
    static struct sockaddr_in members[MOST_MEMBERS];
    static struct mmsghdr member_headers[MOST_MEMBERS];
    if (argc < 2) return 2;
    bool is_flight = !strcmp(argv[1], "flight"), is_out = is_flight || !strcmp(argv[1], "out"), segmented = argc > 2;
    int burst = is_flight ? FLIGHT : OUT_BURST, at_most = 65507 / STREAM_SIZE; /* segments of one message */
    bool is_in = !strcmp(argv[1], "in"), is_fan = !strcmp(argv[1], "fan");
    int member_count = 0;
    alarm(LONGEST_LIFE);

    struct sockaddr_in address = {.sin_family = AF_INET};
    socklen_t length = sizeof address;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_DGRAM, 0), size = RECEIVE_BUFFER;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (bind(fd, (struct sockaddr *)&address, length) || getsockname(fd, (struct sockaddr *)&address, &length)) {
        perror("bind");
        return 1;
    }
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);

    union {
        char room[CMSG_SPACE(sizeof(uint16_t))];
        struct cmsghdr header;
    } control = {.header = {.cmsg_len = CMSG_LEN(sizeof(uint16_t)), .cmsg_level = SOL_UDP, .cmsg_type = UDP_SEGMENT}};
    *(uint16_t *)CMSG_DATA(&control.header) = STREAM_SIZE;
    int messages = 0; /* in a burst */
    for (int i = 0; i < burst; i++) {
        stream[i][0] = i;
        stream_iov[i] = (struct iovec){stream[i], STREAM_SIZE};
    }
    for (int i = 0; i < burst; i += segmented ? at_most : 1) {
        struct msghdr *message = &stream_headers[messages++].msg_hdr;
        message->msg_iov = &stream_iov[i];
        message->msg_iovlen = !segmented ? 1 : burst - i < at_most ? burst - i : at_most;
        if (message->msg_iovlen > 1) {
            message->msg_control = &control;
            message->msg_controllen = sizeof control;
        }
    }
    for (unsigned long counted = 0;;) {
        for (int i = 0; i < BATCH; i++) {
            iov[i] = (struct iovec){payload[i], ROOM};
            headers[i].msg_hdr = (struct msghdr){
                .msg_name = &peers[i], .msg_namelen = sizeof peers[i], .msg_iov = &iov[i], .msg_iovlen = 1};
        }
        int got = recvmmsg(fd, headers, BATCH, MSG_WAITFORONE, NULL);
        if (got < 0) {
            perror("recvmmsg");
            return 1;
        }
        for (int i = 0; i < got; i++) {
            if (is_in && ++counted % IN_BURST == 0)
                sendto(fd, payload[i], ACKNOWLEDGEMENT, 0, (struct sockaddr *)&peers[i], sizeof peers[i]);
            if (is_out) {
                for (int k = 0; k < messages; k++) {
                    stream_headers[k].msg_hdr.msg_name = &peers[i];
                    stream_headers[k].msg_hdr.msg_namelen = sizeof peers[i];
                }
                sendmmsg(fd, stream_headers, messages, 0);
            }
            iov[i].iov_len = headers[i].msg_len;
            if (is_fan && payload[i][0] == JOIN[0] && member_count < MOST_MEMBERS) {
                members[member_count++] = peers[i];
                sendto(fd, payload[i], headers[i].msg_len, 0, (struct sockaddr *)&peers[i], sizeof peers[i]);
            } else if (is_fan) {
                for (int k = 0; k < member_count; k++)
                    member_headers[k].msg_hdr = (struct msghdr){
                        .msg_name = &members[k], .msg_namelen = sizeof members[k], .msg_iov = &iov[i], .msg_iovlen = 1};
                sendmmsg(fd, member_headers, member_count, 0);
            }
        }
        if (!is_out && !is_in && !is_fan) sendmmsg(fd, headers, got, 0);
    }
}
