// Threads that help with one call.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace rewrite_core {

// A call runs on its caller's thread from start to end. In each() others help: as many as come, whenever they come. The
// caller does what nobody else has taken, and waits only for tasks that others have begun. So a helper whose core is
// taken by another process costs the call its help, and nothing more; and nothing may depend on how many help.
// Tasks and what goes into each are fixed by the shape alone: then results have the same bits whoever does them.
//
// There are two kinds of helpers. On a quiet machine they are OpenMP's, because torch's own are the same ones where it
// uses the same runtime (libgomp, as its Linux builds do): they are awake already, and after torch's last operation
// they spin for milliseconds on the very cores that other threads would want. But a parallel region of OpenMP ends only
// when every thread was there, though it be late and there be nothing left to do. Where that costs time again and
// again (Crowd), cores are taken, and the next calls use threads of this library (team.cpp), which wait awake for
// microseconds and then asleep, and for whom nobody waits.
class Team {
 public:
  // Runs work(team) with up to `threads` - 1 helpers. OpenMP gives fewer where its settings say so (OMP_THREAD_LIMIT,
  // OMP_DYNAMIC, a call from a parallel region), but libgomp ends the process where the system starts no more threads.
  template <class Work>
  static void run(int threads, const Work& work) {
    if (threads <= 1) {
      Team alone(1, false);
      work(alone);
      return;
    }
#ifdef _OPENMP
    if (!own_helpers()) {
      Team team(threads, false);
      std::chrono::steady_clock::time_point done;
#pragma omp parallel num_threads(threads)
      {
        const int worker = omp_get_thread_num();
        if (worker == 0) {
          work(team);
          team.ended_ = true;
          done = std::chrono::steady_clock::now();
        } else {
          team.attend(worker);
        }
      }
      waited(std::chrono::steady_clock::now() - done);
      return;
    }
#endif
    if (const std::shared_ptr<Team> team = call(threads)) {
      work(*team);
      dismiss(*team);
    } else {
      Team alone(1, false);
      work(alone);
    }
  }

  // Whether cores are taken, as far as calls have shown: then a helper may be late in every each().
  static bool crowded();

  // Whose threads help: "openmp", "own", or "" for what suits. For tests.
  static bool choose(const std::string& kind);

  Team(int workers, bool own_helpers);
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Most workers there can be.
  int workers() const { return workers_; }

  // Runs body(worker) on this thread, as worker 0, and on every helper that comes before this one is done. Inside,
  // next() deals out tasks 0, 1, ... No two at once are the same worker, but one may come twice. It must not throw.
  template <class Body>
  void each(const Body& body) {
    next_.store(0, std::memory_order_relaxed);
    if (workers_ == 1) {
      body(0);
      return;
    }
    body_ = &body;
    run_ = [](const void* what, int worker) { (*static_cast<const Body*>(what))(worker); };
    open();
    body(0);
    close();
  }

  int64_t next() { return next_.fetch_add(1, std::memory_order_relaxed); }

 private:
  friend class Helpers;

  static std::shared_ptr<Team> call(int threads);  // null where there is no memory
  static void dismiss(Team& team);
  static bool own_helpers();
  static void waited(std::chrono::steady_clock::duration time);  // for OpenMP's helpers, at a call's end

  void open();
  void close();
  void attend(int worker);                 // helps until the call ends
  bool help(uint64_t& phase, int worker);  // in a phase other than `phase`, if there is one

  static constexpr uint64_t is_open = uint64_t{1} << 31, one_phase = uint64_t{1} << 32;

  const int workers_;
  uint64_t number_ = 0;  // of all teams
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<uint64_t> gate_{0};  // the phase, whether it is open, and how many helpers are inside
  std::atomic<bool> ended_{false}, waiting_{false};
  alignas(64) std::atomic<int> free_seats_{0};
  std::vector<int> seats_;  // of own helpers that are not here; Helpers' lock guards it
  const void* body_ = nullptr;
  void (*run_)(const void*, int) = nullptr;
  std::mutex lock_;
  std::condition_variable left_;
};

// Whether cores are taken, by how long calls wait at their end for OpenMP's helpers. One late helper does not say so:
// the threads of another program, too, spin for some milliseconds after their last work. Nor does one that is in time
// say the contrary: it has its core for some milliseconds, and then another program has. Calls in several threads at
// once may lose a sign, and nothing else.
class Crowd {
 public:
  using Duration = std::chrono::steady_clock::duration;

  static constexpr Duration late = std::chrono::microseconds(150);   // more than it takes to wake a thread
  static constexpr Duration proof = std::chrono::milliseconds(20);   // from the first sign to the change of mind
  static constexpr Duration apart = std::chrono::milliseconds(100);  // between late calls that are no one row

  // A call waited so long and ended at `now`, which is any clock's.
  void waited(Duration time, Duration now);

  // Whether a call that starts at `now` does better without them. From time to time one tries.
  bool expected(Duration now) const;

 private:
  static constexpr Duration::rep never = std::numeric_limits<Duration::rep>::min();

  std::atomic<bool> crowded_{false};
  std::atomic<Duration::rep> until_{never};                // the next trial
  std::atomic<Duration::rep> first_{never}, last_{never};  // signs against what is believed
};

// One thread alone, with the same interface.
class Solo {
 public:
  int workers() const { return 1; }
  template <class Body>
  void each(const Body& body) {
    task_ = 0;
    body(0);
  }
  int64_t next() { return task_++; }

 private:
  int64_t task_ = 0;
};

}  // namespace rewrite_core
