/* The load for every server: closed loops over loopback, cheap enough that only the server's cost counts.
 *
 *     load PORT PIDS WARM SECONDS echo CLIENTS IN_FLIGHT    64 bytes each; the server answers with the same
 *     load PORT PIDS WARM SECONDS proxied CLIENTS IN_FLIGHT    the same, behind a PROXY header in front of each datagram
 *     load @NAME PIDS WARM SECONDS unix CLIENTS             the same over Unix-domain sockets; one in flight for each client
 *     load PORT PIDS WARM SECONDS out BURST                 the server answers every request with BURST datagrams
 *     load PORT PIDS WARM SECONDS in                        the server acknowledges every IN_BURST-th datagram
 *     load PORT PIDS WARM SECONDS fan MEMBERS               the server sends each question to all members
 *
 * It warms the server up for WARM seconds, and until every client has been answered. Then it measures for SECONDS, and
 * prints as JSON: the datagrams that came through, the time and the server's CPU time for them, and since the start the
 * datagrams that were lost or out of order, and the longest round trip. With a negative WARM it measures from the
 * first datagram until every client has been served. PIDS are the server's process ids, separated by commas.
 *
 * A hundred thousand clients do not need a hundred thousand sockets. There is one socket, bound to all addresses.
 * IP_PKTINFO sets the source of each datagram to 127.0.0.1, 127.0.0.2 and so on, and says which of them got an answer.
 *
 * STREAM_SIZE, IN_BURST, JOIN and RECEIVE_BUFFER are defined on the compiler's command line, as in traffic.py. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/udp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    ECHO_SIZE = 64,               /* bytes of a payload */
    BATCH = 64,                   /* datagrams of one system call */
    OUT_REQUESTS = 2,             /* in flight */
    FAN_QUESTIONS = 2,            /* in flight */
    IN_BURSTS = 4,                /* in flight */
    STALL = 5,                    /* seconds of silence after which all in flight counts as lost; not less,
                                     for garbage collection among 100,000 clients takes a while */
    MAX_STALLS = 3,               /* in a row */
    MAX_PROCESSES = 64,           /* of the server */
    MAX_CLIENTS = (1 << 24) - 2,  /* in 127.0.0.0/8 */
    BUCKETS = 200000, BUCKET_NS = 100, /* round trips are counted in steps of 0.1 µs, up to 20 ms */
};

static struct sockaddr_in server = {.sin_family = AF_INET};
static clockid_t server_clocks[MAX_PROCESSES];
static int processes;
static double warm, seconds;

static uint64_t received, lost, out_of_order, longest_round_trip;
static uint32_t round_trips[BUCKETS];
static struct {
    uint64_t first_call, began, server_then, received_then; /* nanoseconds, and datagrams, at the beginning */
    uint64_t took, server_took, datagrams;                  /* until the end */
    bool ended;
} measured;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t nanoseconds(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t)) fail("clock_gettime");
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t server_nanoseconds(void) {
    uint64_t sum = 0;
    for (int i = 0; i < processes; i++) sum += nanoseconds(server_clocks[i]);
    return sum;
}

/* Called repeatedly; true after the end of the measurement. */
static bool time_is_up(bool every_client_seen) {
    if (measured.ended) return true;
    uint64_t now = nanoseconds(CLOCK_MONOTONIC);
    bool from_the_first = warm < 0;
    if (!measured.first_call) measured.first_call = now;
    if (!measured.began) {
        if (from_the_first || (every_client_seen && now - measured.first_call >= warm * 1e9)) {
            measured.began = now;
            measured.server_then = server_nanoseconds();
            measured.received_then = received;
            memset(round_trips, 0, sizeof round_trips);
        }
    } else if (from_the_first ? every_client_seen : now - measured.began >= seconds * 1e9) {
        measured.took = now - measured.began;
        measured.server_took = server_nanoseconds() - measured.server_then;
        measured.datagrams = received - measured.received_then;
        measured.ended = true;
    }
    return measured.ended;
}

static int open_socket(void) {
    int fd = socket(AF_INET, SOCK_DGRAM, 0), size = RECEIVE_BUFFER;
    struct timeval stall = {.tv_sec = STALL};
    if (fd < 0) fail("socket");
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size)) fail("SO_RCVBUF");
    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &stall, sizeof stall)) fail("SO_RCVTIMEO");
    return fd;
}

static int open_connected_socket(void) {
    int fd = open_socket();
    if (connect(fd, (struct sockaddr *)&server, sizeof server)) fail("connect");
    return fd;
}

/* Wait for datagrams; 0 after a stall. */
static int receive(int fd, struct mmsghdr *messages, int most) {
    static int stalls;
    int got = recvmmsg(fd, messages, most, MSG_WAITFORONE, NULL);
    if (got < 0) {
        if (errno != EAGAIN) fail("recvmmsg");
        if (++stalls < MAX_STALLS) return 0;
        fprintf(stderr, "the server does not answer\n");
        exit(1);
    }
    stalls = 0;
    return got;
}

static void count_round_trip(uint64_t took) {
    uint64_t bucket = took / BUCKET_NS;
    round_trips[bucket < BUCKETS ? bucket : BUCKETS - 1]++;
    if (took > longest_round_trip) longest_round_trip = took;
}

/* ---- echo ---- */

struct message { /* a datagram, with the control message for our own address */
    struct {
        uint64_t run; /* answers to an earlier run, and answers that counted as lost, are ignored */
        uint64_t sent_at;
        uint32_t client, number;
        char rest[ECHO_SIZE - 24];
    } payload;
    struct __attribute__((packed)) { /* as it precedes a datagram over IPv4: section 2.2 of the PROXY protocol */
        char signature[12];
        uint8_t version, family;
        uint16_t length;
        uint32_t source, destination;
        uint16_t source_port, destination_port;
    } proxy;
    struct sockaddr_in peer;
    struct iovec iov[2];
    union {
        char room[CMSG_SPACE(sizeof(struct in_pktinfo))];
        struct cmsghdr header;
    } control;
};

static int echo_socket, queued;
static uint64_t run;
static uint32_t *next_sent, *next_expected; /* of each client */
static struct message incoming[BATCH], outgoing[BATCH];
static struct mmsghdr incoming_headers[BATCH], outgoing_headers[BATCH];

static void prepare(struct message *messages, struct mmsghdr *headers, bool proxied) {
    for (int i = 0; i < BATCH; i++) {
        struct message *m = &messages[i];
        m->peer = server;
        memcpy(m->proxy.signature, "\r\n\r\n\0\r\nQUIT\n", 12);
        m->proxy.version = 0x21; /* version 2, PROXY */
        m->proxy.family = 0x12;  /* IPv4, datagrams */
        m->proxy.length = htons(12);
        m->proxy.destination = server.sin_addr.s_addr;
        m->proxy.source_port = htons(1024); /* not the server's port, or the server would take the client for itself */
        m->proxy.destination_port = server.sin_port;
        m->iov[0] = (struct iovec){&m->proxy, sizeof m->proxy};
        m->iov[1] = (struct iovec){&m->payload, sizeof m->payload};
        m->control.header.cmsg_len = CMSG_LEN(sizeof(struct in_pktinfo));
        m->control.header.cmsg_level = IPPROTO_IP;
        m->control.header.cmsg_type = IP_PKTINFO;
        headers[i].msg_hdr = (struct msghdr){
            .msg_name = &m->peer, .msg_namelen = sizeof m->peer,
            .msg_iov = proxied ? m->iov : &m->iov[1], .msg_iovlen = proxied ? 2 : 1,
            .msg_control = &m->control, .msg_controllen = sizeof m->control};
    }
}

static struct in_pktinfo *own_address(struct message *message) {
    return (struct in_pktinfo *)CMSG_DATA(&message->control.header);
}

static void send_queued(void) {
    uint64_t now = nanoseconds(CLOCK_MONOTONIC);
    for (int i = 0; i < queued; i++) outgoing[i].payload.sent_at = now;
    if (queued && sendmmsg(echo_socket, outgoing_headers, queued, 0) != queued) fail("sendmmsg");
    queued = 0;
}

static void queue(uint32_t client) {
    struct message *m = &outgoing[queued++];
    m->payload.run = run;
    m->payload.client = client;
    m->payload.number = next_sent[client]++;
    own_address(m)->ipi_spec_dst.s_addr = m->proxy.source = htonl(INADDR_LOOPBACK + client);
    if (queued == BATCH) send_queued();
}

/* 0 clients: every datagram comes from a new client. */
static void load_echo(uint32_t clients, uint32_t in_flight, bool proxied) {
    bool strangers = clients == 0;
    if (strangers) clients = MAX_CLIENTS;
    bool in_turn = clients > in_flight; /* otherwise the client that was answered sends again */
    uint64_t turns = 0;
    uint32_t on_their_way = 0;
    int on = 1;
    echo_socket = open_socket();
    if (setsockopt(echo_socket, IPPROTO_IP, IP_PKTINFO, &on, sizeof on)) fail("IP_PKTINFO");
    next_sent = calloc(clients, sizeof *next_sent);
    next_expected = calloc(clients, sizeof *next_expected);
    prepare(incoming, incoming_headers, false);
    prepare(outgoing, outgoing_headers, proxied);
    run = (uint64_t)getpid() << 32;

    for (;;) {
        bool stop = time_is_up(strangers || turns >= clients);
        if (on_their_way == 0) { /* the start, or all datagrams were lost, or the end */
            if (stop) return;
            run++;
            for (uint32_t i = 0; i < in_flight; i++) queue(turns++ % clients);
            send_queued();
            on_their_way = in_flight;
        }
        for (int i = 0; i < BATCH; i++) incoming_headers[i].msg_hdr.msg_controllen = sizeof incoming[i].control;
        int got = receive(echo_socket, incoming_headers, BATCH);
        if (got == 0) {
            lost += on_their_way;
            on_their_way = 0;
        }
        uint64_t now = nanoseconds(CLOCK_MONOTONIC);
        for (int i = 0; i < got; i++) {
            struct message *m = &incoming[i];
            if (incoming_headers[i].msg_len != ECHO_SIZE || m->payload.run != run) continue;
            uint32_t client = m->payload.client;
            if (own_address(m)->ipi_addr.s_addr != htonl(INADDR_LOOPBACK + client)) {
                fprintf(stderr, "a client was sent what is another's\n");
                exit(1);
            }
            if (m->payload.number < next_expected[client])
                out_of_order++;
            else
                next_expected[client] = m->payload.number + 1;
            count_round_trip(now - m->payload.sent_at);
            received++;
            on_their_way--;
            if (!stop) {
                queue(in_turn ? turns++ % clients : client);
                on_their_way++;
            }
        }
        send_queued();
    }
}

/* The server has an abstract name. The clients have files, since uvloop cannot answer an abstract name. */
static char folder[] = "/tmp/trio-udp-load-XXXXXX";
static struct sockaddr_un *unix_clients;
static uint32_t unix_count;

static void remove_files(void) {
    for (uint32_t i = 0; i < unix_count; i++) unlink(unix_clients[i].sun_path);
    rmdir(folder);
}

static void load_unix(const char *name, uint32_t clients) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    struct timeval stall = {.tv_sec = STALL};
    socklen_t length = offsetof(struct sockaddr_un, sun_path) + strlen(name);
    struct { uint64_t sent_at; char rest[ECHO_SIZE - 8]; } payload = {0};
    int *fds = calloc(clients, sizeof *fds);
    bool *waits = calloc(clients, sizeof *waits); /* for an answer */
    memcpy(to.sun_path + 1, name + 1, strlen(name) - 1);
    unix_clients = calloc(clients, sizeof *unix_clients);
    if (!mkdtemp(folder) || atexit(remove_files)) fail(folder);
    for (uint32_t i = 0; i < clients; i++) {
        struct sockaddr_un *own = &unix_clients[unix_count++];
        own->sun_family = AF_UNIX;
        snprintf(own->sun_path, sizeof own->sun_path, "%s/%u", folder, i);
        if ((fds[i] = socket(AF_UNIX, SOCK_DGRAM, 0)) < 0) fail("socket");
        if (bind(fds[i], (struct sockaddr *)own, sizeof *own)) fail("bind");
        if (setsockopt(fds[i], SOL_SOCKET, SO_RCVTIMEO, &stall, sizeof stall)) fail("SO_RCVTIMEO");
    }
    for (bool stop = false; !stop;) {
        stop = time_is_up(true);
        for (uint32_t i = 0; i < clients; i++) {
            if (waits[i]) {
                if (recv(fds[i], &payload, sizeof payload, 0) != sizeof payload) fail("recv");
                count_round_trip(nanoseconds(CLOCK_MONOTONIC) - payload.sent_at);
                received++;
            }
            payload.sent_at = nanoseconds(CLOCK_MONOTONIC);
            waits[i] = !stop;
            if (!stop && sendto(fds[i], &payload, sizeof payload, 0, (struct sockaddr *)&to, length) < 0) fail("sendto");
        }
    }
}

/* Clients 1, 2, ... are members, and client 0 asks. Every question comes back once to each member. Its number tells the
 * order. The first byte of a payload, which is the lowest of ``run``, tells whether it asks to join. */
static void load_fan(uint32_t members) {
    const uint64_t join = (unsigned char)JOIN[0], question = '?';
    uint32_t joined = 0, due = 0;
    int on = 1;
    echo_socket = open_socket();
    if (setsockopt(echo_socket, IPPROTO_IP, IP_PKTINFO, &on, sizeof on)) fail("IP_PKTINFO");
    next_sent = calloc(members + 1, sizeof *next_sent);
    next_expected = calloc(members + 1, sizeof *next_expected);
    prepare(incoming, incoming_headers, false);
    prepare(outgoing, outgoing_headers, false);
    run = join;
    for (uint32_t i = 1; i <= members; i++) queue(i);
    send_queued();

    for (;;) {
        bool stop = joined == members && time_is_up(true);
        if (stop && due == 0) return;
        if (joined == members) {
            run = question;
            for (; !stop && due + members <= FAN_QUESTIONS * members; due += members) queue(0);
            send_queued();
        }
        for (int i = 0; i < BATCH; i++) incoming_headers[i].msg_hdr.msg_controllen = sizeof incoming[i].control;
        int got = receive(echo_socket, incoming_headers, BATCH);
        if (got == 0) {
            if (joined < members) {
                fprintf(stderr, "not every member could join\n");
                exit(1);
            }
            lost += due;
            due = 0;
        }
        uint64_t now = nanoseconds(CLOCK_MONOTONIC);
        for (int i = 0; i < got; i++) {
            struct message *m = &incoming[i];
            uint32_t member = ntohl(own_address(m)->ipi_addr.s_addr) - INADDR_LOOPBACK;
            if (incoming_headers[i].msg_len != ECHO_SIZE || member < 1 || member > members) {
                fprintf(stderr, "a client got an answer for another one\n");
                exit(1);
            }
            if (m->payload.run == join) {
                joined++;
                continue;
            }
            if (m->payload.number < next_expected[member])
                out_of_order++;
            else
                next_expected[member] = m->payload.number + 1;
            count_round_trip(now - m->payload.sent_at);
            received++;
            if (due) due--;
        }
    }
}

/* The quantile of the round trips, in microseconds. */
static double round_trip(double share) {
    uint64_t all = 0, seen = 0;
    int bucket = 0;
    for (int i = 0; i < BUCKETS; i++) all += round_trips[i];
    while (bucket < BUCKETS - 1 && (seen += round_trips[bucket]) < share * all) bucket++;
    return bucket * BUCKET_NS / 1e3;
}

/* ---- streams ---- */

/* The first byte of each datagram is its number within its burst. What the server's kernel sends as one large packet
 * arrives here as one too (UDP_GRO), as it does where a network card takes such packets apart. */
static void load_out(unsigned burst) {
    enum { AT_ONCE = 16, ROOM = 65536 };
    static char payload[AT_ONCE][ROOM], control[AT_ONCE][CMSG_SPACE(sizeof(int))];
    static struct iovec iov[AT_ONCE];
    static struct mmsghdr headers[AT_ONCE];
    int fd = open_connected_socket(), on = 1;
    if (setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof on)) fail("UDP_GRO");
    for (int i = 0; i < AT_ONCE; i++) {
        iov[i] = (struct iovec){payload[i], ROOM};
        headers[i].msg_hdr = (struct msghdr){.msg_iov = &iov[i], .msg_iovlen = 1, .msg_control = control[i]};
    }

    unsigned due = 0, expected = 0; /* the datagrams still expected, and the number of the next one */
    for (;;) {
        bool stop = time_is_up(true);
        if (stop && due == 0) return;
        while (!stop && due + burst <= OUT_REQUESTS * burst) {
            if (send(fd, "more", 4, 0) != 4) fail("send");
            due += burst;
        }
        for (int i = 0; i < AT_ONCE; i++) headers[i].msg_hdr.msg_controllen = sizeof control[i];
        int got = receive(fd, headers, AT_ONCE);
        if (got == 0) {
            lost += due;
            due = 0;
            expected = 0;
        }
        for (int i = 0; i < got; i++) {
            for (unsigned at = 0; at < headers[i].msg_len; at += STREAM_SIZE) {
                unsigned number = (unsigned char)payload[i][at];
                if (number != expected) out_of_order++;
                expected = (number + 1) % burst;
                received++;
                if (due) due--;
            }
        }
    }
}

/* Each datagram begins with its number. An acknowledgement is the first bytes of the datagram that it acknowledges. */
static void load_in(void) {
    static struct {
        uint64_t number;
        char rest[STREAM_SIZE - 8];
    } burst[IN_BURST];
    uint64_t acknowledgement = 0, sent = 0, came_last = 0;
    struct iovec iov = {&acknowledgement, sizeof acknowledgement};
    struct mmsghdr header = {.msg_hdr = {.msg_iov = &iov, .msg_iovlen = 1}};
    int fd = open_connected_socket(), size = STREAM_SIZE, on_their_way = 0; /* bursts */
    if (setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &size, sizeof size)) fail("UDP_SEGMENT");
    for (;;) {
        bool stop = time_is_up(true);
        if (stop && on_their_way == 0) return;
        for (; !stop && on_their_way < IN_BURSTS; on_their_way++) {
            for (int i = 0; i < IN_BURST; i++) burst[i].number = sent++;
            if (send(fd, burst, sizeof burst, 0) != sizeof burst) fail("send");
        }
        if (receive(fd, &header, 1) == 0) {
            on_their_way = 0;
            continue;
        }
        if (on_their_way) on_their_way--;
        if (acknowledgement < came_last) out_of_order++;
        came_last = acknowledgement;
        received += IN_BURST;
        lost = came_last + 1 - received; /* if no datagram was lost, this one is the last of those counted */
    }
}

int main(int argc, char **argv) {
    if (argc < 6) return 2;
    server.sin_port = htons(atoi(argv[1]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    for (char *pid = strtok(argv[2], ","); pid && processes < MAX_PROCESSES; pid = strtok(NULL, ","))
        if ((errno = clock_getcpuclockid(atoi(pid), &server_clocks[processes++]))) fail("clock_getcpuclockid");
    warm = atof(argv[3]);
    seconds = atof(argv[4]);
    bool proxied = !strcmp(argv[5], "proxied");
    if ((proxied || !strcmp(argv[5], "echo")) && argc == 8)
        load_echo(atoi(argv[6]), atoi(argv[7]), proxied);
    else if (!strcmp(argv[5], "unix") && argc == 7)
        load_unix(argv[1], atoi(argv[6]));
    else if (!strcmp(argv[5], "fan") && argc == 7)
        load_fan(atoi(argv[6]));
    else if (!strcmp(argv[5], "out") && argc == 7)
        load_out(atoi(argv[6]));
    else if (!strcmp(argv[5], "in"))
        load_in();
    else
        return 2;
    printf("{\"datagrams\": %llu, \"seconds\": %.9f, \"server_seconds\": %.9f, \"lost\": %llu, \"out_of_order\": %llu, "
           "\"round_trip_p50\": %.1f, \"round_trip_p99\": %.1f, \"round_trip_longest\": %.1f}\n",
           (unsigned long long)measured.datagrams, measured.took / 1e9, measured.server_took / 1e9,
           (unsigned long long)lost, (unsigned long long)out_of_order, round_trip(0.5), round_trip(0.99), longest_round_trip / 1e3);
    return 0;
}
