#include "team.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <new>
#include <system_error>
#include <thread>

#include "simd.h"

namespace rewrite_core {
namespace {

// How long who waits stays awake, in pauses: some tens of microseconds, what a sleep and a waking cost together.
constexpr int patience = 1500;

template <class Condition>
bool wait_awake(Condition reached) {
  for (int pauses = 0; pauses < patience; ++pauses) {
    if (reached()) return true;
    pause_thread();
  }
  return reached();
}

}  // namespace

// The threads and the teams that have a seat for them.
class Helpers {
 public:
  // The process's own; a forked child has none of its parent's threads, so it gets another.
  static Helpers& all() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { instance() = new Helpers; });
    static_cast<void>(registered);
    return *instance();
  }

  void post(const std::shared_ptr<Team>& team) {
    const std::lock_guard<std::mutex> guard(lock_);
    teams_.push_back(team);
    team->number_ = ++posted_;
    while (threads_ < team->workers_ - 1 && start()) ++threads_;
  }

  void remove(const Team& team) {
    const std::lock_guard<std::mutex> guard(lock_);
    teams_.erase(std::find_if(teams_.begin(), teams_.end(), [&](const auto& one) { return one.get() == &team; }));
  }

  // A phase was opened by a team that has seats left.
  void wake(int seats) {
    opened_.fetch_add(1);
    seats = std::min(seats, asleep_.load());
    if (seats <= 0) return;
    lock_.lock();  // who is about to sleep has looked before, or sleeps now
    lock_.unlock();
    while (seats-- > 0) called_.notify_one();
  }

 private:
  static Helpers*& instance() {
    static Helpers* helpers = new Helpers;  // never destroyed: its threads run as long as the process
    return helpers;
  }

  bool start() {
    sigset_t every, before;
    sigfillset(&every);
    pthread_sigmask(SIG_SETMASK, &every, &before);  // signals are for the program's own threads
    bool started = true;
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // no more threads to be had: fewer do the same work
      started = false;
    } catch (const std::bad_alloc&) {
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  // A seat in a team that has a phase open, but for `phase` of team `number`.
  std::shared_ptr<Team> find(uint64_t number, uint64_t phase, int& seat) {
    for (const std::shared_ptr<Team>& team : teams_) {
      const uint64_t gate = team->gate_.load();
      const bool done = team->number_ == number && gate / Team::one_phase == phase;
      if (team->seats_.empty() || !(gate & Team::is_open) || done) continue;
      seat = team->seats_.back();
      team->seats_.pop_back();
      team->free_seats_.fetch_sub(1);
      return team;
    }
    return nullptr;
  }

  void serve() {
    uint64_t number = 0, phase = 0;  // the team that this thread helped last, and the last phase there
    for (;;) {
      std::shared_ptr<Team> team;
      int seat = 0;
      uint64_t opened = 0;
      {
        std::unique_lock<std::mutex> guard(lock_);
        asleep_.fetch_add(1);
        called_.wait(guard, [&] {
          opened = opened_.load();
          return (team = find(number, phase, seat)) != nullptr;
        });
        asleep_.fetch_sub(1);
      }
      if (team->number_ != number) phase = 0;
      number = team->number_;
      while (!team->ended_ && wait_awake([&] { return team->ended_ || team->help(phase, seat); })) continue;
      {
        const std::lock_guard<std::mutex> guard(lock_);
        team->seats_.push_back(seat);
        team->free_seats_.fetch_add(1);
      }
      team.reset();
      wait_awake([&] { return opened_.load(std::memory_order_relaxed) != opened; });
    }
  }

  std::mutex lock_;
  std::condition_variable called_;
  std::vector<std::shared_ptr<Team>> teams_;
  uint64_t posted_ = 0;
  int threads_ = 0;
  std::atomic<int> asleep_{0};
  std::atomic<uint64_t> opened_{0};
};

Team::Team(int workers, bool own_helpers) : workers_(workers) {
  if (!own_helpers) return;
  for (int seat = workers - 1; seat > 0; --seat) seats_.push_back(seat);
  free_seats_.store(workers - 1, std::memory_order_relaxed);
}

namespace {

using Clock = std::chrono::steady_clock;

Crowd crowd;
std::atomic<int> chosen{0};  // of choose(): 1 OpenMP's, 2 own

}  // namespace

bool Team::choose(const std::string& kind) {
  const int choice = kind.empty() ? 0 : kind == "openmp" ? 1 : kind == "own" ? 2 : -1;
  if (choice >= 0) chosen = choice;
  return choice >= 0;
}

bool Team::crowded() { return !chosen && crowd.expected(Clock::now().time_since_epoch()); }

bool Team::own_helpers() { return chosen ? chosen == 2 : crowded(); }

void Team::waited(Clock::duration time) { crowd.waited(time, Clock::now().time_since_epoch()); }

bool Crowd::expected(Duration now) const { return crowded_ && now.count() < until_.load(std::memory_order_relaxed); }

void Crowd::waited(Duration time, Duration now) {
  const bool is_late = time >= late;
  if (is_late != crowded_) {
    if (first_ == never || (is_late && now.count() - last_ > apart.count())) first_ = now.count();
    last_ = now.count();
    if (now.count() - first_ < proof.count()) return;
    crowded_ = is_late;
  } else if (!is_late) {
    return;
  }
  first_ = never;
  // What a trial costs is a small part of the time until the next.
  if (is_late) until_ = (now + std::min<Duration>(40 * time, std::chrono::seconds(1))).count();
}

void Team::attend(int worker) {
  for (uint64_t phase = 0; !ended_;) {
    if (!wait_awake([&] { return ended_ || help(phase, worker); })) std::this_thread::yield();
  }
}

std::shared_ptr<Team> Team::call(int threads) {
  try {
    const std::shared_ptr<Team> team = std::make_shared<Team>(threads, true);
    Helpers::all().post(team);
    return team;
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void Team::dismiss(Team& team) {
  team.ended_ = true;
  Helpers::all().remove(team);
}

void Team::open() {
  gate_.store((gate_.load(std::memory_order_relaxed) / one_phase + 1) * one_phase + is_open);
  const int seats = free_seats_.load();
  if (seats > 0) Helpers::all().wake(seats);
}

void Team::close() {
  gate_.fetch_and(~is_open);
  const auto alone = [&] { return gate_.load(std::memory_order_acquire) % one_phase == 0; };
  if (wait_awake(alone)) return;
  // Asleep: the system then moves a helper that waits for a core to this one.
  std::unique_lock<std::mutex> guard(lock_);
  waiting_ = true;
  left_.wait(guard, [&] { return gate_.load() % one_phase == 0; });
  waiting_ = false;
}

bool Team::help(uint64_t& phase, int worker) {
  uint64_t gate = gate_.load(std::memory_order_relaxed);
  if (!(gate & is_open) || gate / one_phase == phase) return false;
  if (!gate_.compare_exchange_strong(gate, gate + 1, std::memory_order_acquire)) return false;
  phase = gate / one_phase;
  run_(body_, worker);
  gate = gate_.fetch_sub(1) - 1;
  if (gate % one_phase == 0 && waiting_) {
    const std::lock_guard<std::mutex> guard(lock_);
    left_.notify_one();
  }
  return true;
}

}  // namespace rewrite_core
