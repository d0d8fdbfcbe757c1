// The host's half of gpu.h: kernels run on the CPU, every thread of a team a fiber. Barriers and what lanes do together
// switch fibers. For tests: slow, one CPU thread, but the kernel's own source, and stricter than a GPU:
//   - a fiber runs on alone until it waits, and in an order that `seed` chooses: what only a barrier prevents comes out
//     as other bits under some order;
//   - shared memory is a heap block of exactly the size asked for, NaN at the start, and NaN again when its block ends;
//   - threads that wait at different barriers, or for one that has ended, are an error that is told.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define GPU_ADDRESS_SANITIZER 1
#else
#define GPU_ADDRESS_SANITIZER 0
#endif

#define GPU_KERNEL(threads) inline void
#define GPU_FUNCTION inline
#define GPU_UNROLL
#define GPU_ROLLED
#define GPU_UNROLL_BY_4

namespace gpu {

constexpr int warp_size = 32;
constexpr bool has_clusters = true;

struct Launch {
  int teams = 1, blocks = 1, threads = 32;  // of all, of a team, of a block
  int64_t shared_bytes = 0;                 // of a block
  unsigned seed = 0;                        // 0: threads run in order; 1: the last first; else by chance
  int removed = -1;                         // the number of a barrier that nobody waits at
};

namespace fibers {

constexpr int64_t stack_bytes = 1 << 16;

// Where threads wait for each other. `place` says what for: all must wait for the same.
struct Meeting {
  int expected = 0, ended = 0, place = 0;
  std::vector<struct Fiber*> waiting;
};

struct Warp {
  Meeting meeting;
  double given[warp_size][10], taken[warp_size][4];  // of a lane
};

struct Block {
  std::unique_ptr<char[]> shared;
  Meeting meeting;
  std::vector<Warp> warps;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  int thread = 0, rank = 0;
  bool ended = false;
};

struct Machine {
  Launch launch;
  int team = 0;
  std::vector<Block> blocks;
  Meeting meeting;
  std::vector<Fiber> all;
  std::vector<Fiber*> ready;
  std::mt19937 chance;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;
  void (*entry)(const void*) = nullptr;
  const void* kernel = nullptr;
  std::string wrong;

  Block& block() { return blocks[current->rank]; }
  Warp& warp() { return block().warps[current->thread / warp_size]; }
};

inline Machine* machine = nullptr;

inline void fail(const std::string& what) {
  if (machine->wrong.empty()) machine->wrong = what;
}

// As swapcontext(), of which AddressSanitizer says that it does not know it; it is told of the stacks below.
inline void change(ucontext_t& from, const ucontext_t& to) {
  volatile bool back = false;
  getcontext(&from);
  if (back) return;
  back = true;
  setcontext(&to);
}

// Back to the scheduler; returns when this fiber's turn comes again.
inline void give_way() {
  Machine& m = *machine;
  Fiber& me = *m.current;
#if GPU_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(me.ended ? nullptr : &me.fake_stack, m.scheduler_stack, m.scheduler_stack_bytes);
#endif
  change(me.context, m.scheduler);
#if GPU_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(me.fake_stack, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
}

// Waits until all are here; the last to come runs `work` first.
template <class Work>
void meet(Meeting& meeting, int place, const char* who, Work work) {
  Machine& m = *machine;
  if (meeting.ended) fail(std::string("a thread waits for ") + who + ", of which some have ended");
  if (!meeting.waiting.empty() && meeting.place != place) {
    fail(std::string(who) + " wait at two places at once: " + std::to_string(meeting.place) + " and " +
         std::to_string(place));
  }
  meeting.place = place;
  meeting.waiting.push_back(m.current);
  if (static_cast<int>(meeting.waiting.size()) == meeting.expected) {
    work();
    m.ready.insert(m.ready.end(), meeting.waiting.begin(), meeting.waiting.end());
    meeting.waiting.clear();
  }
  give_way();
}

constexpr int shuffles = -1, products = -2;  // places that are no barriers

inline void body() {
  Machine& m = *machine;
#if GPU_ADDRESS_SANITIZER
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_bytes);
#endif
  m.entry(m.kernel);
  m.current->ended = true;
  Block& block = m.block();
  ++m.warp().meeting.ended, ++m.meeting.ended;
  if (++block.meeting.ended == m.launch.threads) {
    std::memset(block.shared.get(), 0xff, static_cast<size_t>(m.launch.shared_bytes));
  }
  give_way();
}

inline Fiber* next() {
  Machine& m = *machine;
  const size_t count = m.ready.size();
  const size_t at = m.launch.seed == 0 ? 0 : m.launch.seed == 1 ? count - 1 : m.chance() % count;
  Fiber* const chosen = m.ready[at];
  if (m.launch.seed > 1) {
    m.ready[at] = m.ready.back();
    m.ready.pop_back();
  } else {
    m.ready.erase(m.ready.begin() + static_cast<std::ptrdiff_t>(at));
  }
  return chosen;
}

inline void run_team() {
  Machine& m = *machine;
  const Launch& launch = m.launch;
  m.blocks.clear();
  m.blocks.resize(launch.blocks);
  m.meeting = Meeting{};
  m.meeting.expected = launch.blocks * launch.threads;
  for (Block& block : m.blocks) {
    block.shared.reset(new char[static_cast<size_t>(launch.shared_bytes)]);
    std::memset(block.shared.get(), 0xff, static_cast<size_t>(launch.shared_bytes));  // doubles and floats: NaN
    block.meeting.expected = launch.threads;
    block.warps.resize(launch.threads / warp_size);
    for (Warp& warp : block.warps) warp.meeting.expected = warp_size;
  }
  m.all.resize(m.meeting.expected);
  m.ready.clear();
  for (size_t i = 0; i < m.all.size(); ++i) {
    Fiber& fiber = m.all[i];
    fiber.rank = static_cast<int>(i) / launch.threads;
    fiber.thread = static_cast<int>(i) % launch.threads;
    fiber.ended = false;
    fiber.fake_stack = nullptr;
    if (!fiber.stack) fiber.stack.reset(new char[stack_bytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
    m.ready.push_back(&fiber);
  }
  while (!m.ready.empty() && m.wrong.empty()) {
    Fiber* const fiber = next();
    m.current = fiber;
#if GPU_ADDRESS_SANITIZER
    __sanitizer_start_switch_fiber(&m.scheduler_fake_stack, fiber->stack.get(), stack_bytes);
#endif
    change(m.scheduler, fiber->context);
#if GPU_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(m.scheduler_fake_stack, nullptr, nullptr);
#endif
  }
  const bool done = std::all_of(m.all.begin(), m.all.end(), [](const Fiber& fiber) { return fiber.ended; });
  if (!done) fail("threads wait for others that never come");
}

}  // namespace fibers

// Runs `kernel()` on every thread of the launch, team after team: "", or what went wrong. Not from several threads.
template <class Kernel>
std::string run(const Launch& launch, Kernel kernel) {
  if (launch.threads < warp_size || launch.threads % warp_size) return "a block has 32 threads, or 64, ...";
  fibers::Machine m;
  m.launch = launch;
  m.chance.seed(launch.seed);
  m.kernel = &kernel;
  m.entry = [](const void* it) { (*static_cast<const Kernel*>(it))(); };
  fibers::machine = &m;
  for (m.team = 0; m.team < launch.teams && m.wrong.empty(); ++m.team) fibers::run_team();
  fibers::machine = nullptr;
  return m.wrong;
}

inline int thread() { return fibers::machine->current->thread; }
inline int threads() { return fibers::machine->launch.threads; }
inline int lane() { return thread() % warp_size; }
inline int warp() { return thread() / warp_size; }
inline int warps() { return threads() / warp_size; }
inline int rank() { return fibers::machine->current->rank; }
inline int blocks() { return fibers::machine->launch.blocks; }
inline int team() { return fibers::machine->team; }
inline char* shared() { return fibers::machine->block().shared.get(); }

template <class T>
T* peer(T* mine, int rank) {
  fibers::Machine& m = *fibers::machine;
  const int64_t offset = reinterpret_cast<const char*>(mine) - m.block().shared.get();
  if (offset < 0 || offset >= m.launch.shared_bytes) fibers::fail("peer() of what is not in shared memory");
  if (m.blocks[rank].meeting.ended == m.launch.threads) fibers::fail("peer() of a block that has ended");
  return reinterpret_cast<T*>(m.blocks[rank].shared.get() + offset);
}

template <int number>
void sync_block() {
  if (number == fibers::machine->launch.removed) return;
  fibers::meet(fibers::machine->block().meeting, number, "the threads of a block", [] {});
}

template <int number>
void sync_team() {
  if (number == fibers::machine->launch.removed) return;
  fibers::meet(fibers::machine->meeting, number, "the threads of a team", [] {});
}

template <int number>
void sync_warp() {
  if (number == fibers::machine->launch.removed) return;
  fibers::meet(fibers::machine->warp().meeting, number, "the lanes of a warp", [] {});
}

template <class T>
T shuffle(T value, int from) {
  static_assert(sizeof(T) <= 8, "what a register or two hold");
  fibers::Warp& warp = fibers::machine->warp();
  const int me = lane();
  const double source = from;
  std::memcpy(&warp.given[me][0], &value, sizeof(T));
  warp.given[me][1] = source;
  fibers::meet(warp.meeting, fibers::shuffles, "the lanes of a warp", [&warp] {
    for (int i = 0; i < warp_size; ++i) {
      std::memcpy(&warp.taken[i][0], &warp.given[static_cast<int>(warp.given[i][1]) % warp_size][0], 8);
    }
  });
  std::memcpy(&value, &warp.taken[me][0], sizeof(T));
  return value;
}

template <class T>
T shuffle_xor(T value, int mask) {
  return shuffle(value, lane() ^ mask);
}

inline void mma(double (&c)[2], double a, double b) {
  fibers::Warp& warp = fibers::machine->warp();
  const int me = lane();
  warp.given[me][0] = a, warp.given[me][1] = b, warp.given[me][2] = c[0], warp.given[me][3] = c[1];
  fibers::meet(warp.meeting, fibers::products, "the lanes of a warp", [&warp] {
    for (int i = 0; i < warp_size; ++i) {
      for (int which = 0; which < 2; ++which) {
        const int row = i / 4, column = 2 * (i % 4) + which;
        double sum = warp.given[i][2 + which];
        for (int k = 0; k < 4; ++k) sum = std::fma(warp.given[4 * row + k][0], warp.given[4 * column + k][1], sum);
        warp.taken[i][which] = sum;
      }
    }
  });
  c[0] = warp.taken[me][0], c[1] = warp.taken[me][1];
}

inline void mma(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  fibers::Warp& warp = fibers::machine->warp();
  double* const mine = warp.given[lane()];
  std::copy(a, a + 4, mine), std::copy(b, b + 2, mine + 4), std::copy(c, c + 4, mine + 6);
  fibers::meet(warp.meeting, fibers::products, "the lanes of a warp", [&warp] {
    for (int i = 0; i < warp_size; ++i) {
      for (int which = 0; which < 4; ++which) {
        const int low = which / 2, row = i / 4, column = 2 * (i % 4) + which % 2;  // low: of the lower eight rows
        float sum = static_cast<float>(warp.given[i][6 + which]);
        for (int k = 0; k < 8; ++k) {
          const double left = warp.given[4 * row + k % 4][2 * (k / 4) + low];
          const double right = warp.given[4 * column + k % 4][4 + k / 4];
          sum = static_cast<float>(sum + left * right);  // a product of such numbers is exact
        }
        warp.taken[i][which] = sum;
      }
    }
  });
  const double* const taken = warp.taken[lane()];
  for (int which = 0; which < 4; ++which) c[which] = static_cast<float>(taken[which]);
}

inline float cut_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits &= 0xffffe000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float round_tf32(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x1000u) & 0xffffe000u;
  std::memcpy(&value, &bits, 4);
  return value;
}

namespace fibers {

inline void check_aligned(const float* at, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) fail("an address is no multiple of " + std::to_string(bytes));
}

}  // namespace fibers

inline void load_two(const float* from, float (&to)[2]) {
  fibers::check_aligned(from, 8);
  std::copy(from, from + 2, to);
}

inline void load_four(const float* from, float (&to)[4]) {
  fibers::check_aligned(from, 16);
  std::copy(from, from + 4, to);
}

inline void store_four(float* to, const float (&from)[4]) {
  fibers::check_aligned(to, 16);
  std::copy(from, from + 4, to);
}

template <class T>
T load(const T* from) {
  return *from;
}

inline double inverse_root(double value) { return 1 / std::sqrt(value); }
inline float root(float value) { return std::sqrt(value); }
inline float quick_root(float value) { return std::sqrt(value); }
inline float quick_quotient(float value, float by) { return value / by; }
inline double not_a_number() { return std::numeric_limits<double>::quiet_NaN(); }

}  // namespace gpu
