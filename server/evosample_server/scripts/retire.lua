-- Decides, by the head as it stands now, which plans nobody needs any more, and takes them out of the registry: from here
-- on nothing can be written to them, and none of them can be committed. Their columns are then removed at leisure.
-- KEYS: head, plans, epochs, doomed, pins. ARGV: uid, retained epochs, plan_id of an attempt that lost ('' if none)
-- Returns the plan_ids whose columns are to be removed, those that an earlier caller left included.
local h = redis.call('HMGET', KEYS[1], 'uid', 'epoch', 'plan_id', 'groups_id')
if h[1] ~= ARGV[1] or h[3] == '' then
  return {}
end
local current = tonumber(h[2])
local is_pinned = {}
for _, epoch in ipairs(redis.call('HVALS', KEYS[5])) do
  is_pinned[epoch] = true
end
for _, epoch in ipairs(redis.call('HKEYS', KEYS[3])) do
  if tonumber(epoch) <= current - tonumber(ARGV[2]) and not is_pinned[epoch] then
    redis.call('HDEL', KEYS[3], epoch)
  end
end
local plans = redis.call('HGETALL', KEYS[2])
for i = 1, #plans, 2 do
  local plan_id, epoch = plans[i], plans[i + 1]
  local is_needed = plan_id == h[3] or plan_id == h[4] or redis.call('HGET', KEYS[3], epoch) == plan_id
  if not is_needed and (tonumber(epoch) <= current or plan_id == ARGV[3]) then
    redis.call('HDEL', KEYS[2], plan_id)
    redis.call('HSET', KEYS[4], plan_id, epoch)
  end
end
return redis.call('HKEYS', KEYS[4])
