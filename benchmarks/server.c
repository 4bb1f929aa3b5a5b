/* The lowest possible cost of a server: the same work in C, with many datagrams in each system call.
 *
 *     server echo|once|out|in|fan    prints its port, then serves on it until it is killed; servers.py describes each mode
 *
 * The compiler's command line defines the names in capitals that are not defined here, as in servers.py. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BATCH = 64, ROOM = 2048, ACKNOWLEDGEMENT = 8, MOST_MEMBERS = 64 };

int main(int argc, char **argv) {
    static char payload[BATCH][ROOM], stream[OUT_BURST][STREAM_SIZE];
    static struct sockaddr_in peers[BATCH];
    static struct iovec iov[BATCH], stream_iov[OUT_BURST];
    static struct mmsghdr headers[BATCH], stream_headers[OUT_BURST];
    static struct sockaddr_in members[MOST_MEMBERS];
    static struct mmsghdr member_headers[MOST_MEMBERS];
    if (argc != 2) return 2;
    bool is_out = !strcmp(argv[1], "out"), is_in = !strcmp(argv[1], "in"), is_fan = !strcmp(argv[1], "fan");
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

    for (int i = 0; i < OUT_BURST; i++) {
        stream[i][0] = i;
        stream_iov[i] = (struct iovec){stream[i], STREAM_SIZE};
        stream_headers[i].msg_hdr = (struct msghdr){.msg_iov = &stream_iov[i], .msg_iovlen = 1};
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
                for (int k = 0; k < OUT_BURST; k++) {
                    stream_headers[k].msg_hdr.msg_name = &peers[i];
                    stream_headers[k].msg_hdr.msg_namelen = sizeof peers[i];
                }
                sendmmsg(fd, stream_headers, OUT_BURST, 0);
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
