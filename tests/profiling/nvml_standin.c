/* A stand-in for NVIDIA's libnvidia-ml.so.1, so that pynvml's real C boundary (symbols, structs, return codes) is
 * exercised on machines without a card. Structs follow nvml.h (NVML API reference, "Device Structs"); a struct
 * that carries a version is refused unless the version names this layout's own size.
 *
 * Values come from a table of name=number pairs: the environment variable NVML_STANDIN ("0.used=5;0.total=9") at
 * the first initialisation, and nvml_standin_set() at any time. "error.<function>" is that function's return code.
 * Device d (0 or 1) has UUID GPU-<d>... and a bus of its own; 2 is a MIG instance, found by its UUID alone. Built
 * with -DOLD_DRIVER, the calls that drivers before 510 lack are missing.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int nvmlReturn_t;
typedef struct standin_device *nvmlDevice_t;

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };
enum { VERSION_MISMATCH = 25 };

typedef struct {
    unsigned long long total, free, used;
} nvmlMemory_t;

typedef struct {
    unsigned int version;
    unsigned long long total, reserved, free, used;
} nvmlMemory_v2_t;

typedef struct {
    unsigned int pid;
    unsigned long long usedGpuMemory;
    unsigned int gpuInstanceId, computeInstanceId;
} nvmlProcessInfo_t;

typedef struct {
    unsigned int gpu, memory;
} nvmlUtilization_t;

struct standin_device {
    int number;
    const char *uuid, *bus, *name;
};

static struct standin_device devices[] = {
    {0, "GPU-00000000-1111-2222-3333-444444444444", "00000000:01:00.0", "Stand-in A"},
    {1, "GPU-10000000-1111-2222-3333-444444444444", "00000000:02:00.0", "Stand-in B"},
    {2, "MIG-20000000-1111-2222-3333-444444444444", "", "Stand-in B MIG 1g"},
};

#define MAX_VALUES 128
static struct {
    char name[64];
    unsigned long long value;
} values[MAX_VALUES];
static int num_values, num_users;

void nvml_standin_set(const char *name, unsigned long long value) {
    for (int i = 0; i < num_values; i++) {
        if (strcmp(values[i].name, name) == 0) {
            values[i].value = value;
            return;
        }
    }
    if (num_values == MAX_VALUES) abort();
    snprintf(values[num_values].name, sizeof values[0].name, "%s", name);
    values[num_values++].value = value;
}

int nvml_standin_users(void) { return num_users; }

static unsigned long long get(const char *name, unsigned long long otherwise) {
    for (int i = 0; i < num_values; i++) {
        if (strcmp(values[i].name, name) == 0) return values[i].value;
    }
    return otherwise;
}

static unsigned long long of(nvmlDevice_t device, const char *what, unsigned long long otherwise) {
    char name[64];
    snprintf(name, sizeof name, "%d.%s", device->number, what);
    return get(name, otherwise);
}

static nvmlReturn_t check(const char *function) {
    char name[64];
    snprintf(name, sizeof name, "error.%s", function);
    unsigned long long code = get(name, 0);
    if (code) return (nvmlReturn_t)code;
    return num_users > 0 ? SUCCESS : UNINITIALIZED;
}
#define CHECK()                                   \
    do {                                          \
        nvmlReturn_t code = check(__func__);      \
        if (code != SUCCESS) return code;         \
    } while (0)

static void read_environment(void) {
    static int done;
    if (done++) return;
    const char *text = getenv("NVML_STANDIN");
    char copy[4096], *rest = copy;
    snprintf(copy, sizeof copy, "%s", text ? text : "");
    for (char *pair = strtok_r(rest, ";", &rest); pair; pair = strtok_r(rest, ";", &rest)) {
        char *equals = strchr(pair, '=');
        if (!equals) abort();
        *equals = 0;
        nvml_standin_set(pair, strtoull(equals + 1, NULL, 10));
    }
}

nvmlReturn_t nvmlInitWithFlags(unsigned int flags) {
    (void)flags;
    read_environment();
    unsigned long long code = get("error.nvmlInitWithFlags", 0);
    if (code) return (nvmlReturn_t)code;
    num_users++;
    return SUCCESS;
}

nvmlReturn_t nvmlShutdown(void) {
    CHECK();
    num_users--;
    return SUCCESS;
}

const char *nvmlErrorString(nvmlReturn_t code) {
    (void)code;
    return "an error of the stand-in";
}

static nvmlReturn_t text(const char *from, char *to, unsigned int size) {
    if (strlen(from) + 1 > size) return INSUFFICIENT_SIZE;
    strcpy(to, from);
    return SUCCESS;
}

nvmlReturn_t nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    CHECK();
    return text("580.00.standin", version, length);
}

nvmlReturn_t nvmlDeviceGetHandleByIndex_v2(unsigned int index, nvmlDevice_t *device) {
    CHECK();
    if (index > 1) return INVALID_ARGUMENT;
    *device = &devices[index];
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetHandleByUUID(const char *uuid, nvmlDevice_t *device) {
    CHECK();
    for (int i = 0; i < 3; i++) {
        if (strcmp(devices[i].uuid, uuid) == 0) {
            *device = &devices[i];
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetHandleByPciBusId_v2(const char *bus, nvmlDevice_t *device) {
    CHECK();
    for (int i = 0; i < 2; i++) {
        if (strcmp(devices[i].bus, bus) == 0) {
            *device = &devices[i];
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}

nvmlReturn_t nvmlDeviceGetUUID(nvmlDevice_t device, char *uuid, unsigned int length) {
    CHECK();
    return text(device->uuid, uuid, length);
}

nvmlReturn_t nvmlDeviceGetName(nvmlDevice_t device, char *name, unsigned int length) {
    CHECK();
    return text(device->name, name, length);
}

nvmlReturn_t nvmlDeviceGetMigMode(nvmlDevice_t device, unsigned int *current, unsigned int *pending) {
    CHECK();
    if (device->number == 2) return INVALID_ARGUMENT;
    *current = *pending = (unsigned int)of(device, "mig", 0);
    return SUCCESS;
}

/* Version 1 counts the driver's reserve as used; version 2 does not. */
nvmlReturn_t nvmlDeviceGetMemoryInfo(nvmlDevice_t device, nvmlMemory_t *memory) {
    CHECK();
    memory->total = of(device, "total", 0);
    memory->used = of(device, "used", 0) + of(device, "reserved", 0);
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

static nvmlReturn_t processes(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_t *infos) {
    unsigned int listed = (unsigned int)of(device, "processes", 0);
    if (listed > *count) {
        *count = listed;
        return INSUFFICIENT_SIZE;
    }
    *count = listed;
    for (unsigned int i = 0; i < listed; i++) {
        char name[64];
        snprintf(name, sizeof name, "process.%u.pid", i);
        /* pid 0 in the table stands for the process that asks. */
        unsigned long long pid = of(device, name, 1000 + i);
        infos[i].pid = pid ? (unsigned int)pid : (unsigned int)getpid();
        snprintf(name, sizeof name, "process.%u.used", i);
        infos[i].usedGpuMemory = of(device, name, 0);
        infos[i].gpuInstanceId = infos[i].computeInstanceId = 0xFFFFFFFFu;
    }
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v2(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_t *infos) {
    CHECK();
    return processes(device, count, infos);
}

#ifndef OLD_DRIVER
nvmlReturn_t nvmlDeviceGetMemoryInfo_v2(nvmlDevice_t device, nvmlMemory_v2_t *memory) {
    CHECK();
    if (memory->version != (sizeof(nvmlMemory_v2_t) | (2u << 24))) return VERSION_MISMATCH;
    memory->total = of(device, "total", 0);
    memory->used = of(device, "used", 0);
    memory->reserved = of(device, "reserved", 0);
    memory->free = memory->total - memory->used - memory->reserved;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetComputeRunningProcesses_v3(nvmlDevice_t device, unsigned int *count, nvmlProcessInfo_t *infos) {
    CHECK();
    return processes(device, count, infos);
}
#endif

nvmlReturn_t nvmlDeviceGetUtilizationRates(nvmlDevice_t device, nvmlUtilization_t *utilization) {
    CHECK();
    if (device->number == 2) return NOT_SUPPORTED;
    utilization->gpu = (unsigned int)of(device, "utilization", 0);
    utilization->memory = 99;
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetPowerUsage(nvmlDevice_t device, unsigned int *milliwatts) {
    CHECK();
    if (device->number == 2) return NOT_SUPPORTED;
    *milliwatts = (unsigned int)of(device, "milliwatts", 0);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTotalEnergyConsumption(nvmlDevice_t device, unsigned long long *millijoules) {
    CHECK();
    if (device->number == 2) return NOT_SUPPORTED;
    *millijoules = of(device, "millijoules", 0);
    return SUCCESS;
}

nvmlReturn_t nvmlDeviceGetTemperature(nvmlDevice_t device, int sensor, unsigned int *celsius) {
    CHECK();
    if (sensor != 0) return INVALID_ARGUMENT;
    *celsius = (unsigned int)of(device, "celsius", 0);
    return SUCCESS;
}
