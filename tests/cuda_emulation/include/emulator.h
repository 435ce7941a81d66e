// Emulates CUDA's execution model on the CPU: every thread of a block is a fiber, blocks run one
// after another, and barriers and warp operations are points where fibers wait for each other.
//
// It proves logic: indices, barriers, shuffles, reductions, accesses. It says nothing of speed nor
// of the memory ordering of real hardware. MMDEFORM_EMULATION_SEED other than 0 runs blocks and
// threads in an order shuffled anew between any two barriers, which makes a missing barrier show.

#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 48 * 1024;
constexpr int kPoison = 0xff;  // NaN as a float, -1 as an integer
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif

enum class State { kReady, kAtWarpOperation, kAtBlockBarrier, kExited };

// What a thread brings to a warp operation and takes from it.
struct WarpRequest {
  const char* operation;
  unsigned mask;
  unsigned source;  // lane whose value is asked for
  uint64_t value[2];
  uint64_t result[2];
  unsigned ballot;  // lanes of the mask whose value is not zero
};

// Where a fiber, or the scheduler, stopped. A fiber starts by its context and goes on by jumps:
// swapcontext and longjmp make system calls, the former for the signal mask at every switch, both
// under AddressSanitizer. The compiler's own jumps make none.
struct Place {
  ucontext_t context;
  void* jump[5];
  bool started = false;
};

[[noreturn]] __attribute__((noinline, no_sanitize_address)) inline void jump_to(void** jump) {
  __builtin_longjmp(jump, 1);
}

__attribute__((noinline, no_sanitize_address)) inline void switch_places(Place& from, Place& to) {
  if (__builtin_setjmp(from.jump) != 0) return;
  from.started = true;
  if (to.started) jump_to(to.jump);
  setcontext(&to.context);
}

struct Fiber {
  Place place;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::kExited;
  WarpRequest request;
};

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  void launch(const char* kernel, dim3 grid, unsigned threads, size_t shared_bytes,
              const std::function<void()>& body) {
    std::lock_guard<std::mutex> lock(mutex_);
    kernel_ = kernel;
    if (grid.x == 0 || threads == 0 || threads > kMaxThreads || shared_bytes > kMaxSharedBytes) {
      throw std::runtime_error(describe() +
                               "invalid launch configuration: " + std::to_string(grid.x) +
                               " blocks of " + std::to_string(threads) + " threads with " +
                               std::to_string(shared_bytes) + " bytes of shared memory");
    }
    const char* seed = std::getenv("MMDEFORM_EMULATION_SEED");
    seed_ = seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10);
    random_.seed(seed_);
    body_ = &body;
    gridDim = grid;
    blockDim = dim3(threads);
    std::vector<unsigned> blocks(size_t{grid.x} * grid.y * grid.z);
    std::iota(blocks.begin(), blocks.end(), 0u);
    shuffle(blocks);
    for (const unsigned block : blocks) {
      blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
      run_block(threads, shared_bytes);
    }
  }

  // Called by threads.

  void wait_at_block_barrier() {
    current().state = State::kAtBlockBarrier;
    switch_to_scheduler();
  }

  template <typename T>
  T exchange(const char* operation, unsigned mask, unsigned source, T value, unsigned* ballot) {
    static_assert(sizeof(T) <= sizeof(WarpRequest::value) && std::is_trivially_copyable_v<T>);
    WarpRequest& request = current().request;
    request.operation = operation;
    request.mask = mask;
    request.source = source;
    request.value[0] = request.value[1] = 0;
    std::memcpy(request.value, &value, sizeof(T));
    current().state = State::kAtWarpOperation;
    switch_to_scheduler();
    if (ballot != nullptr) *ballot = request.ballot;
    std::memcpy(&value, request.result, sizeof(T));
    return value;
  }

  unsigned lane() const { return current_ % kWarp; }

  unsigned char* dynamic_shared() { return dynamic_shared_; }

  void register_shared(unsigned char* data, size_t size) {
    std::memset(data, kPoison, size);
    shared_arrays_.emplace_back(data, size);
  }

 private:
  Fiber& current() { return fibers_[current_]; }

  std::string describe() const {
    std::ostringstream text;
    text << "CUDA emulator: kernel " << kernel_ << ", block " << blockIdx.x << ": ";
    return text.str();
  }

  void shuffle(std::vector<unsigned>& order) {
    if (seed_ != 0) std::shuffle(order.begin(), order.end(), random_);
  }

  void run_block(unsigned threads, size_t shared_bytes) {
    for (auto& [data, size] : shared_arrays_) std::memset(data, kPoison, size);
    // A fresh allocation of the exact size lets AddressSanitizer see what lies beyond.
    std::vector<unsigned char> dynamic(shared_bytes, static_cast<unsigned char>(kPoison));
    dynamic_shared_ = dynamic.data();
    prepare(threads);
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    for (bool alive = true; alive;) {
      shuffle(order);
      for (const unsigned thread : order) {
        if (fibers_[thread].state == State::kReady) resume(thread);
        if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
      }
      alive = release_waiting(threads);
    }
  }

  void prepare(unsigned threads) {
    error_ = nullptr;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& fiber = fibers_[i];
      // A thread that has exited is parked at the end of its loop; one that an error left in the
      // middle of a kernel starts anew.
      if (fiber.stack == nullptr || fiber.state != State::kExited) create(fiber);
      fiber.state = State::kReady;
    }
  }

  static void create(Fiber& fiber) {
    if (fiber.stack == nullptr) {
      fiber.stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (fiber.stack == MAP_FAILED) throw std::bad_alloc();
    }
    ucontext_t& context = fiber.place.context;
    getcontext(&context);
    context.uc_stack.ss_sp = fiber.stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, &Machine::run_threads, 0);
    fiber.place.started = false;
    fiber.fake_stack = nullptr;
  }

  static void run_threads() {
    Machine& machine = get();
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack_, &machine.scheduler_size_);
#endif
    for (;;) {
      try {
        (*machine.body_)();
      } catch (...) {
        machine.error_ = std::current_exception();
      }
      machine.current().state = State::kExited;
      machine.switch_to_scheduler();
    }
  }

  void resume(unsigned thread) {
    current_ = thread;
    threadIdx = {thread, 0, 0};
    Fiber& fiber = fibers_[thread];
#ifdef __SANITIZE_ADDRESS__
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
#endif
    switch_places(scheduler_, fiber.place);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  void switch_to_scheduler() {
    Fiber& fiber = current();
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack_, scheduler_size_);
#endif
    switch_places(fiber.place, scheduler_);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack_, &scheduler_size_);
#endif
  }

  // Lets waiting threads go on where everyone they wait for has come. Returns false at the end of
  // the block, and throws where nobody can go on.
  bool release_waiting(unsigned threads) {
    bool released = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers_[i].state == State::kAtWarpOperation) released |= release_warp(i, threads);
    }
    const unsigned waiting = count(threads, State::kAtBlockBarrier);
    const unsigned exited = count(threads, State::kExited);
    if (!released && waiting == threads) {
      for (unsigned i = 0; i < threads; ++i) fibers_[i].state = State::kReady;
      released = true;
    }
    if (!released && exited != threads) throw_divergence(threads, waiting, exited);
    return exited != threads;
  }

  unsigned count(unsigned threads, State state) const {
    return static_cast<unsigned>(
        std::count_if(fibers_.begin(), fibers_.begin() + threads,
                      [state](const Fiber& fiber) { return fiber.state == state; }));
  }

  // Completes the warp operation at which thread waits, if all lanes of its mask are there.
  bool release_warp(unsigned thread, unsigned threads) {
    const unsigned first = thread / kWarp * kWarp;
    const unsigned lanes = std::min(kWarp, threads - first);
    const WarpRequest& asked = fibers_[thread].request;
    unsigned ballot = 0;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if (!(asked.mask >> lane & 1)) continue;
      const Fiber& other = fibers_[first + lane];
      if (other.state != State::kAtWarpOperation || other.request.mask != asked.mask ||
          std::strcmp(other.request.operation, asked.operation) != 0) {
        return false;
      }
      if (other.request.value[0] | other.request.value[1]) ballot |= 1u << lane;
    }
    if (!(asked.mask >> (thread - first) & 1)) return false;
    const unsigned mask = asked.mask;
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      Fiber& fiber = fibers_[first + lane];
      WarpRequest& request = fiber.request;
      if (request.source >= lanes || !(mask >> request.source & 1)) {
        throw std::runtime_error(describe() + request.operation + " of lane " +
                                 std::to_string(lane) + " reads lane " +
                                 std::to_string(request.source) + ", which does not take part");
      }
      std::memcpy(request.result, fibers_[first + request.source].request.value,
                  sizeof(request.result));
      request.ballot = ballot;
      fiber.state = State::kReady;
    }
    return true;
  }

  [[noreturn]] void throw_divergence(unsigned threads, unsigned waiting, unsigned exited) const {
    std::ostringstream text;
    text << describe() << "divergent synchronisation: of " << threads << " threads " << waiting
         << " wait at __syncthreads, " << exited << " have exited";
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers_[i].state == State::kAtWarpOperation) {
        text << ", thread " << i << " waits at " << fibers_[i].request.operation << " with mask 0x"
             << std::hex << fibers_[i].request.mask;
        break;
      }
    }
    throw std::runtime_error(text.str());
  }

  std::mutex mutex_;
  const char* kernel_ = "";
  uint64_t seed_ = 0;
  std::mt19937_64 random_;
  const std::function<void()>* body_ = nullptr;
  std::vector<Fiber> fibers_{kMaxThreads};  // never moved: a ucontext_t points into itself
  unsigned current_ = 0;
  Place scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  std::exception_ptr error_;
  unsigned char* dynamic_shared_ = nullptr;
  std::vector<std::pair<unsigned char*, size_t>> shared_arrays_;
};

// Static shared memory: poisoned before every block, so that reading before writing shows.
template <typename T, size_t kCount>
class SharedArray {
 public:
  SharedArray() { Machine::get().register_shared(bytes_, sizeof(bytes_)); }
  T* data() { return reinterpret_cast<T*>(bytes_); }

 private:
  alignas(16) unsigned char bytes_[sizeof(T) * kCount];
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, dim3 grid, unsigned threads, size_t shared_bytes,
            void (*kernel)(Parameters...), const Arguments&... arguments) {
  Machine::get().launch(name, grid, threads, shared_bytes,
                        [&] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace emulator
