/* A stand-in for the NVIDIA driver library, not for a GPU: libcuda.so.1 on host memory.
 *
 * The few calls of the CUDA driver API that runtime/device.py makes, strict with their caller:
 * device addresses are no host pointers, a copy is queued and done only when its stream is waited
 * for, and what is unknown, freed, too long or outside a context is refused. It computes nothing
 * and measures nothing. Signatures, error numbers and rules are those of the driver API reference.
 * A stack of contexts per thread; all else is for one thread at a time. In a test's own process:
 *
 *   cc -shared -fPIC -Wl,-soname,libcuda.so.1 -o libcuda.so.1 host_driver.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID_VALUE = 1, OUT_OF_MEMORY, NOT_INITIALIZED, NO_DEVICE = 100, INVALID_DEVICE };
enum { INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600 };
static const struct { int code; const char *name, *meaning; } ERRORS[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {NOT_READY, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
};
enum { GPUS = 2, BLOCKS = 256, STREAMS = 8, EVENTS = 16, COPIES = 64, DEPTH = 16 };
enum { FREE, DEVICE, PINNED };
typedef uint64_t Address;
typedef struct { int retained; } Context; /* a primary context, one per GPU */
typedef struct { Context *context; } Stream; /* in use while it has a context */
typedef struct { int kind, gpu; size_t bytes; char *memory; Address address; } Block;
typedef struct { Context *context; int marked, done; } Event; /* done: as many copies before it */
typedef struct { Stream *stream; char *to; const char *from; size_t bytes; Event *event; } Copy;

static const size_t MEMORY = 64u << 20;
static const Address FIRST = (Address)0xD << 40;
static Address next_address = FIRST; /* no address is given out twice */
static Context contexts[GPUS];
static Stream streams[STREAMS];
static Block blocks[BLOCKS];
static Event events[EVENTS];
static Copy copies[COPIES]; /* and events between them */
static int queued, copied, initialised;
static _Thread_local Context *stack[DEPTH];
static _Thread_local int depth;
static struct { char call[64]; int nth, code; } failure;

/* For the test: how many GPUs there are; what there is now, context depth on this thread (-1: no
 * such word); and that the nth call from now of an exported function, or "queued copy", fails. */
int host_driver_gpus = 1;

int host_driver_live(const char *what) {
    int count[] = {[DEVICE] = 0, [PINNED] = 0}, in_use = 0, retains = 0, marks = 0;
    for (int i = 0; i < EVENTS; i++) marks += events[i].context != NULL;
    for (int i = 0; i < BLOCKS; i++) count[blocks[i].kind]++;
    for (int i = 0; i < STREAMS; i++) in_use += streams[i].context != NULL;
    for (int i = 0; i < GPUS; i++) retains += contexts[i].retained;
    return !strcmp(what, "device memory") ? count[DEVICE] : !strcmp(what, "queued") ? queued
         : !strcmp(what, "pinned memory") ? count[PINNED] : !strcmp(what, "streams") ? in_use
         : !strcmp(what, "events") ? marks
         : !strcmp(what, "retains") ? retains : !strcmp(what, "context depth") ? depth : -1;
}

void host_driver_fail(const char *call, int nth, int code) {
    snprintf(failure.call, sizeof failure.call, "%s", call);
    failure.nth = nth, failure.code = code;
}

static int injected(const char *call) {
    return !strcmp(failure.call, call) && --failure.nth == 0 ? failure.code : 0;
}

/* What calls check first. */
#define OR_RETURN(check) do { int code_ = (check); if (code_) return code_; } while (0)
#define NEED(condition, code) do { if (!(condition)) return (code); } while (0)
#define READY OR_RETURN(injected(__func__)); NEED(initialised, NOT_INITIALIZED)
#define GPU(gpu) READY; NEED((gpu) >= 0 && (gpu) < host_driver_gpus, INVALID_DEVICE)
#define CONTEXT READY; NEED(current() && current()->retained, INVALID_CONTEXT)
#define STREAM(stream) CONTEXT; NEED(known(stream), INVALID_HANDLE)

static Context *current(void) { return depth ? stack[depth - 1] : NULL; }

static int known(const Stream *stream) { /* and of the current context */
    return stream >= streams && stream < streams + STREAMS && stream->context == current();
}

/* Facts. */
int cuInit(unsigned flags) {
    OR_RETURN(injected(__func__));
    NEED(!flags, INVALID_VALUE);
    NEED(host_driver_gpus, NO_DEVICE);
    initialised = 1;
    return 0;
}

int cuDriverGetVersion(int *version) { *version = 12060; return injected(__func__); }
int cuDeviceGetCount(int *count) { READY; *count = host_driver_gpus; return 0; }
int cuDeviceGet(int *gpu, int index) { GPU(index); *gpu = index; return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int gpu) { GPU(gpu); *bytes = MEMORY; return 0; }

int cuDeviceGetAttribute(int *value, int attribute, int gpu) {
    GPU(gpu);
    NEED(attribute == 18 || attribute == 75 || attribute == 76, INVALID_VALUE);
    *value = attribute == 18 ? 1 : attribute == 75 ? 8 : 7; /* integrated, capability 8.7 */
    return 0;
}

typedef struct { char bytes[16]; } Uuid;

int cuDeviceGetUuid_v2(Uuid *uuid, int gpu) {
    GPU(gpu);
    for (int i = 0; i < 16; i++) uuid->bytes[i] = (char)(16 * gpu + i);
    return 0;
}

int cuDeviceGetUuid(Uuid *uuid, int gpu) { return cuDeviceGetUuid_v2(uuid, gpu); }

int cuDeviceGetName(char *name, int length, int gpu) {
    GPU(gpu);
    memset(name, '?', (size_t)length); /* nothing is promised behind its end */
    snprintf(name, (size_t)length, "stand-in for the driver, no GPU (%d)", gpu);
    return 0;
}

static int look_up(int code, const char **name, const char **meaning) {
    for (size_t i = 0; i < sizeof ERRORS / sizeof *ERRORS; i++)
        if (ERRORS[i].code == code) {
            *name = ERRORS[i].name, *meaning = ERRORS[i].meaning;
            return 0;
        }
    *name = *meaning = NULL;
    return INVALID_VALUE;
}

int cuGetErrorName(int code, const char **text) { const char *_; return look_up(code, text, &_); }
int cuGetErrorString(int code, const char **text) { const char *_; return look_up(code, &_, text); }

/* Contexts: a release pops none. */
int cuDevicePrimaryCtxRetain(Context **context, int gpu) {
    GPU(gpu);
    (*context = &contexts[gpu])->retained++;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int gpu) {
    GPU(gpu);
    NEED(contexts[gpu].retained, INVALID_CONTEXT);
    contexts[gpu].retained--;
    return 0;
}

int cuCtxPushCurrent_v2(Context *context) {
    READY;
    NEED(context >= contexts && context < contexts + GPUS && depth < DEPTH, INVALID_CONTEXT);
    NEED(context->retained, INVALID_CONTEXT);
    stack[depth++] = context;
    return 0;
}

int cuCtxPopCurrent_v2(Context **context) {
    READY;
    NEED(depth, INVALID_CONTEXT);
    *context = stack[--depth];
    return 0;
}

int cuCtxGetCurrent(Context **context) { READY; *context = current(); return 0; }

/* Streams. */
int cuStreamCreate(Stream **stream, unsigned flags) {
    CONTEXT;
    NEED(flags <= 1, INVALID_VALUE);
    for (*stream = streams; (*stream)->context; ++*stream)
        NEED(*stream < streams + STREAMS - 1, OUT_OF_MEMORY);
    (*stream)->context = current();
    return 0;
}

static int finish(const Stream *stream) { /* the work of this one, or of all */
    int kept = 0, code = 0;
    for (int i = 0; i < queued; i++)
        if (stream && copies[i].stream != stream) copies[kept++] = copies[i];
        else if (copies[i].event) copies[i].event->marked = 0, copies[i].event->done = copied;
        else if (!code && !(code = injected("queued copy"))) {
            memcpy(copies[i].to, copies[i].from, copies[i].bytes);
            copied++;
        }
    queued = kept;
    return code;
}

int cuStreamSynchronize(Stream *stream) { STREAM(stream); return finish(stream); }

int cuStreamDestroy_v2(Stream *stream) { /* its work is still done */
    STREAM(stream);
    OR_RETURN(finish(stream));
    stream->context = NULL;
    return 0;
}

/* Events. Their clock counts copies: it measures nothing. */
static int is_event(const Event *event) { /* and of the current context */
    return event >= events && event < events + EVENTS && event->context == current();
}

int cuEventCreate(Event **event, unsigned flags) {
    CONTEXT;
    NEED(!flags, INVALID_VALUE);
    for (*event = events; (*event)->context; ++*event)
        NEED(*event < events + EVENTS - 1, OUT_OF_MEMORY);
    **event = (Event){current(), 0, -1};
    return 0;
}

int cuEventRecord(Event *event, Stream *stream) {
    STREAM(stream);
    NEED(is_event(event), INVALID_HANDLE);
    NEED(queued < COPIES, OUT_OF_MEMORY);
    event->marked = 1;
    copies[queued++] = (Copy){stream, NULL, NULL, 0, event};
    return 0;
}

int cuEventElapsedTime(float *ms, Event *first, Event *second) {
    CONTEXT;
    NEED(is_event(first) && is_event(second), INVALID_HANDLE);
    NEED(first->marked || first->done >= 0, INVALID_HANDLE); /* never recorded */
    NEED(second->marked || second->done >= 0, INVALID_HANDLE);
    NEED(!first->marked && !second->marked, NOT_READY);
    *ms = (float)(second->done - first->done);
    return 0;
}

int cuEventElapsedTime_v2(float *ms, Event *first, Event *second) {
    return cuEventElapsedTime(ms, first, second);
}

int cuEventDestroy_v2(Event *event) {
    CONTEXT;
    NEED(is_event(event), INVALID_HANDLE);
    event->context = NULL;
    return 0;
}

/* Memory. */
static size_t used(void) {
    size_t bytes = 0;
    for (Block *b = blocks; b < blocks + BLOCKS; b++)
        if (b->kind == DEVICE && b->gpu == current() - contexts) bytes += b->bytes;
    return bytes;
}

int cuMemGetInfo_v2(size_t *available, size_t *total) {
    CONTEXT;
    *total = MEMORY, *available = MEMORY - used();
    return 0;
}

static int take(Block **block, int kind, size_t bytes) {
    NEED(bytes, INVALID_VALUE);
    for (*block = blocks; (*block)->kind; ++*block)
        NEED(*block < blocks + BLOCKS - 1, OUT_OF_MEMORY);
    char *memory = malloc(bytes);
    NEED(memory, OUT_OF_MEMORY);
    memset(memory, 0xA5, bytes); /* fresh memory holds anything */
    **block = (Block){kind, (int)(current() - contexts), bytes, memory, (Address)(uintptr_t)memory};
    return 0;
}

static Block *holding(int kind, Address address) { /* the block that this lies in */
    for (Block *b = blocks; b < blocks + BLOCKS; b++)
        if (b->kind == kind && address - b->address < b->bytes) return b;
    return NULL;
}

static int give_back(int kind, Address address) { /* waits for what is queued, as the driver does */
    Block *block = holding(kind, address);
    NEED(block && block->address == address, INVALID_VALUE);
    OR_RETURN(finish(NULL));
    free(block->memory);
    block->kind = FREE;
    return 0;
}

int cuMemAlloc_v2(Address *address, size_t bytes) {
    Block *block;
    CONTEXT;
    NEED(bytes <= MEMORY - used(), OUT_OF_MEMORY);
    OR_RETURN(take(&block, DEVICE, bytes));
    *address = block->address = next_address;
    next_address += (bytes / 4096 + 2) * 4096;
    return 0;
}

int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) {
    Block *block;
    CONTEXT;
    NEED(!flags, INVALID_VALUE);
    OR_RETURN(take(&block, PINNED, bytes));
    *memory = block->memory;
    return 0;
}

int cuMemFree_v2(Address address) { CONTEXT; return give_back(DEVICE, address); }
int cuMemFreeHost(void *memory) { CONTEXT; return give_back(PINNED, (Address)(uintptr_t)memory); }

/* Copies. Of host memory that is not its own the driver knows only that it is no device address. */
static int copy(int to_device, Address address, char *host, size_t bytes, Stream *stream) {
    Address at = (Address)(uintptr_t)host;
    Block *block = holding(DEVICE, address), *pinned = holding(PINNED, at);
    NEED(block && bytes <= block->bytes - (address - block->address), INVALID_VALUE);
    NEED(host && !(at >= FIRST && at < next_address), INVALID_VALUE);
    NEED(!pinned || bytes <= pinned->bytes - (at - pinned->address), INVALID_VALUE);
    NEED(queued < COPIES, OUT_OF_MEMORY);
    char *device = block->memory + (address - block->address);
    copies[queued++] = (Copy){stream, to_device ? device : host, to_device ? host : device, bytes, NULL};
    return 0;
}

int cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t bytes, Stream *stream) {
    STREAM(stream); return copy(1, to, (char *)from, bytes, stream);
}

int cuMemcpyDtoHAsync_v2(void *to, Address from, size_t bytes, Stream *stream) {
    STREAM(stream); return copy(0, from, to, bytes, stream);
}

/* cuda-bindings asks here for all calls, as "cuMemFree", and means the newest, cuMemFree_v2. */
int cuGetProcAddress_v2(const char *call, void **function, int version, uint64_t flags,
                        int *status) {
    char newest[128];
    void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    (void)version, (void)flags;
    snprintf(newest, sizeof newest, "%s_v2", call);
    if (!(*function = dlsym(self, newest))) *function = dlsym(self, call);
    if (status) *status = *function ? 0 : 1; /* CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND */
    return *function ? 0 : NOT_FOUND;
}
