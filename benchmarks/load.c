/* Closed-loop load for a UDP echo server: CLIENTS connected sockets, each with IN_FLIGHT datagrams of 64 bytes on their
 * way. Cheap enough (recvmmsg, sendmmsg) that the server is what is measured.
 *
 *     load PORT CLIENTS IN_FLIGHT SECONDS  ->  prints: answered lost out_of_order
 *
 * Each payload carries its sequence number, so that loss and reordering within a client show, and the process id, so that
 * late answers to an earlier run from the same port do not count. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { SIZE = 64, MOST = 64 }; /* bytes of a payload; datagrams of one system call */

struct client {
    int fd;
    uint64_t next_sent, next_expected;
};

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void send_some(struct client *c, int count) {
    static uint64_t payload[MOST][SIZE / 8];
    static struct iovec iov[MOST];
    static struct mmsghdr messages[MOST];
    for (int i = 0; i < count; i++) {
        payload[i][0] = c->next_sent++;
        payload[i][1] = getpid();
        iov[i] = (struct iovec){payload[i], SIZE};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &iov[i], .msg_iovlen = 1};
    }
    if (sendmmsg(c->fd, messages, count, 0) != count) {
        perror("sendmmsg");
        exit(1);
    }
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    int port = atoi(argv[1]), clients = atoi(argv[2]), in_flight = atoi(argv[3]);
    double seconds = atof(argv[4]);
    if (in_flight < 1 || in_flight > MOST) return 2;

    struct rlimit files = {clients + 100, clients + 100};
    setrlimit(RLIMIT_NOFILE, &files);
    struct client *all = calloc(clients, sizeof *all);
    struct epoll_event *ready = calloc(clients, sizeof *ready);
    int poll = epoll_create1(0);
    struct sockaddr_in server = {.sin_family = AF_INET, .sin_port = htons(port)};
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (int i = 0; i < clients; i++) {
        all[i].fd = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
        if (all[i].fd < 0 || connect(all[i].fd, (struct sockaddr *)&server, sizeof server)) {
            perror("connect");
            return 1;
        }
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &all[i]};
        epoll_ctl(poll, EPOLL_CTL_ADD, all[i].fd, &event);
    }
    static uint64_t payload[MOST][SIZE / 8];
    static struct iovec iov[MOST];
    static struct mmsghdr messages[MOST];
    for (int i = 0; i < MOST; i++) {
        iov[i] = (struct iovec){payload[i], SIZE};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &iov[i], .msg_iovlen = 1};
    }

    uint64_t answered = 0, lost = 0, out_of_order = 0;
    for (int i = 0; i < clients; i++) send_some(&all[i], in_flight);
    double end = now() + seconds;
    while (now() < end) {
        int count = epoll_wait(poll, ready, clients, 200);
        if (count == 0) { /* everything on its way was lost: count that, and start again */
            for (int i = 0; i < clients; i++) {
                lost += all[i].next_sent - all[i].next_expected;
                all[i].next_expected = all[i].next_sent;
                send_some(&all[i], in_flight);
            }
            continue;
        }
        for (int i = 0; i < count; i++) {
            struct client *c = ready[i].data.ptr;
            int got = recvmmsg(c->fd, messages, in_flight, 0, NULL);
            if (got <= 0) continue;
            int ours = 0;
            for (int k = 0; k < got; k++) {
                uint64_t number = payload[k][0];
                if (payload[k][1] != (uint64_t)getpid()) continue;
                ours++;
                if (number < c->next_expected) {
                    out_of_order++;
                } else {
                    lost += number - c->next_expected;
                    c->next_expected = number + 1;
                }
            }
            answered += ours;
            if (ours) send_some(c, ours);
        }
    }
    printf("%llu %llu %llu\n", (unsigned long long)answered, (unsigned long long)lost, (unsigned long long)out_of_order);
    return 0;
}
