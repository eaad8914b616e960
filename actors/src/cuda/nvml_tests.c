/* Stands in for the management library: one GPU, two processes beside the one that asks for the list. */
#include <string.h>
#include <unistd.h>

typedef struct { unsigned pid; unsigned long long bytes; unsigned instance, compute; } Process;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Rates;
static int gpu;

int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { strncpy(text, "580.10", length); return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = &gpu;
    /* 6: not found */
    return strcmp(uuid, "GPU-00010203-0405-0607-0809-0a0b0c0d0eff") == 0 ? 0 : 6;
}
int nvmlDeviceGetMemoryInfo_v2(void *device, Memory *memory) {
    *memory = (Memory){memory->version, 80ull << 30, 0, 10ull << 30, 70ull << 30};
    return device == &gpu ? 0 : 2;
}
static int list(const Process *from, unsigned n, unsigned *count, Process *to) {
    unsigned room = *count;
    *count = n;
    if (room < n) return 7; /* insufficient size */
    memcpy(to, from, n * sizeof *from);
    return 0;
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, Process *to) {
    Process all[] = {{getpid(), 40ull << 30, ~0u, ~0u}, {999999998, 1ull << 30, ~0u, ~0u}, {999999999, 29ull << 30, ~0u, ~0u}};
    return list(all, 3, count, to);
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *device, unsigned *count, Process *to) { return 3; /* not supported */ }
int nvmlDeviceGetTemperature(void *device, int sensor, unsigned *celsius) { *celsius = 61; return 0; }
int nvmlDeviceGetPowerUsage(void *device, unsigned *milliwatts) { *milliwatts = 412500; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *millijoules) { *millijoules = 7654321; return 0; }
int nvmlDeviceGetUtilizationRates(void *device, Rates *rates) { *rates = (Rates){98, 40}; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) { *reasons = 0x4 | 0x40; return 0; }
